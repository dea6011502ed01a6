"""Training on completions from shared sampling: old log-probs from the sampler, stop strings, end-of-sequence ids."""

import copy
import logging

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig
from trl import GRPOTrainer

from grpo_ext.engine.decode import GroupSampler
from tests.tools.models import NF4, random_lora
from tests.tools.paths import TINY_MODEL
from tests.tools.training import adapter_of

STOP = {"generation_kwargs": {"stop_strings": ["1", "2"]}}


def metric(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def scored_without_gradients(trainer):
    """The log-probs of each no-grad scoring pass, except reference passes; filled during training."""
    passes = []
    lm = trainer.model.get_base_model()
    forward = lm.forward

    def recorded(*args, scoring_batch=None, **kwargs):
        if scoring_batch is None:
            return forward(*args, **kwargs)
        scores = forward(*args, scoring_batch=scoring_batch, **kwargs)
        layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
        adapters_on = not any(layer.disable_adapters for layer in layers)
        if adapters_on and not torch.is_grad_enabled():
            passes.append(scores.logps_BC)
        return scores

    lm.forward = recorded
    return passes


TWO_UPDATES = {"num_iterations": 2, "max_steps": 6, "optim": "sgd", "learning_rate": 0.5, "beta": 0.1}


def run(build, model, **settings):
    """A trainer after training, and the number of rows in each pass for old log-probs."""
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **TWO_UPDATES | settings)
    start = adapter_of(trainer)
    passes = scored_without_gradients(trainer) if getattr(trainer, "shares_prompts", False) else []
    trainer.train()
    assert all(not torch.equal(value, start[name]) for name, value in adapter_of(trainer).items())
    return trainer, [len(logps_BC) for logps_BC in passes]


def same_adapters(one, other):
    for name, value in adapter_of(one).items():
        torch.testing.assert_close(adapter_of(other)[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_old_log_probs_are_the_samplers(build, small_model):
    """The first rollout is scored in full, as a check, and the later ones by one row each. Training is the same."""
    ours, counts = run(build, small_model)
    plain, _ = run(build, small_model, share_prompt=False)
    assert counts == [8, 1, 1]
    gaps = metric(ours, "sampling/logp_gap")
    assert len(gaps) == 3
    assert 0 < max(gaps) < 1e-4
    same_adapters(ours, plain)


NF4_IN_16_BITS = BitsAndBytesConfig(**NF4.to_dict() | {"bnb_4bit_compute_dtype": torch.bfloat16})


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"bf16": True}, [8, 8, 8]),
        ({"quantization_config": NF4_IN_16_BITS}, [8, 8, 8]),
        ({"quantization_config": NF4}, [8, 1, 1]),
    ],
    ids=["autocast", "NF4 in bfloat16", "NF4 in float32"],
)
def test_in_16_bits_old_log_probs_are_the_scorers(build, settings, rows):
    """However large epsilon is, and with it the gap that counts as agreement in float32: the sampler's log-probs would
    be off by the rounding of 16 bits in every token."""
    trainer = build(str(TINY_MODEL), peft_config=random_lora(), epsilon=8.0, **TWO_UPDATES | settings)
    passes, outputs = scored_without_gradients(trainer), []
    roll_out = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(roll_out(inputs)) or outputs[-1]
    trainer.train()
    assert [len(logps_BC) for logps_BC in passes] == rows
    assert len(metric(trainer, "sampling/logp_gap")) == 3
    for output, logps_BC in zip(outputs, passes, strict=True):
        is_scored = torch.equal(output["old_per_token_logps"], logps_BC)
        assert is_scored == (len(logps_BC) == 8)


def test_a_sampler_that_disagrees_is_not_trusted(build, small_model, monkeypatch):
    """The sampler's temperature is wrong: TRL scores every rollout, and training does not change."""
    plain, _ = run(build, small_model, share_prompt=False)
    build_sampler = GroupSampler.__init__
    monkeypatch.setattr(GroupSampler, "__init__", lambda self, temperature: build_sampler(self, 2.0))
    ours, counts = run(build, small_model)
    assert counts == [8, 8, 8]
    assert min(metric(ours, "sampling/logp_gap")) > 0.02
    same_adapters(ours, plain)


def test_a_sampler_that_starts_to_disagree_is_no_longer_trusted(build, small_model, monkeypatch):
    sample, calls = GroupSampler.__call__, []

    def drifting(self, *args, **kwargs):
        calls.append(self)
        self.temperature = 0.8 if len(calls) == 1 else 2.0
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(GroupSampler, "__call__", drifting)
    ours, counts = run(build, small_model)
    assert counts == [8, 1, 8, 8]
    monkeypatch.undo()
    plain, _ = run(build, small_model, share_prompt=False)
    same_adapters(ours, plain)


def test_no_scoring_pass_if_none_is_needed(build, small_model):
    trainer, counts = run(build, small_model, num_iterations=1, max_steps=2)
    assert counts == []
    assert metric(trainer, "sampling/logp_gap") == []


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "dapo"])
def test_stop_strings(build, small_model, tokenizer, loss_type):
    """Stock TRL raises an error. Here a completion ends with its stop string, does not count as cut, and stays in the
    loss if cut completions are masked."""
    with pytest.raises(ValueError, match="stop strings"):
        build(small_model, trainer=GRPOTrainer, **STOP).train()
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer, _ = run(
        build, small_model, reward=reward, mask_truncated_completions=True, loss_type=loss_type, max_steps=2, **STOP
    )
    completions = [ids for batch in seen for ids in batch]
    texts = tokenizer.batch_decode(completions)
    ended = [text.endswith(("1", "2", tokenizer.eos_token)) for text in texts]
    assert any(text.endswith(("1", "2")) for text in texts)
    assert not any(digit in text[:-1] for text in texts for digit in "12")
    assert all(len(ids) == 12 for ids, end in zip(completions, ended, strict=True) if not end)
    rows = seen[0]
    cut = [not end for end in ended[: len(rows)]]
    assert metric(trainer, "completions/clipped_ratio")[0] == pytest.approx(sum(cut) / len(cut))
    terminated = [len(ids) for ids, is_cut in zip(rows, cut, strict=True) if not is_cut]
    assert metric(trainer, "completions/mean_terminated_length")[0] == pytest.approx(sum(terminated) / len(terminated))
    buffered = trainer._buffered_inputs[0]
    kept = sorted(buffered["completion_mask"].sum(dim=1).tolist())
    last, last_ended = seen[-1], ended[-len(seen[-1]) :]
    assert kept == sorted(len(ids) * end for ids, end in zip(last, last_ended, strict=True))
    assert buffered["num_items_in_batch"] == sum(kept)


def test_several_end_of_sequence_ids(build, small_model, tokenizer):
    """Ids that the user adds end a completion, which then does not count as cut."""
    ends = tokenizer.convert_tokens_to_ids(list("123456"))
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer, _ = run(
        build, small_model, reward=reward, max_steps=1, num_iterations=1, generation_kwargs={"eos_token_id": ends}
    )
    assert all(ids[-1] in ends or len(ids) == 12 or ids[-1] == tokenizer.eos_token_id for ids in seen)
    assert any(ids[-1] in ends for ids in seen)
    assert not any(token in ends for ids in seen for token in ids[:-1])
    cut = sum(ids[-1] not in [*ends, tokenizer.eos_token_id] for ids in seen) / len(seen)
    assert metric(trainer, "completions/clipped_ratio")[0] == pytest.approx(cut)


def test_what_needs_the_sampling_loop_of_transformers(build, small_model, caplog):
    """Beam search is left to transformers. It is logged once by name, and refused with stop strings before sampling."""
    beams = {"num_beams": 2}
    with caplog.at_level(logging.WARNING):
        trainer = build(copy.deepcopy(small_model), peft_config=random_lora(), generation_kwargs=beams, max_steps=1)
    assert caplog.text.count("transformers' own loop is used: the generation mode is beam_sample") == 1
    assert not trainer.parts.sampler.is_shared
    trainer.train()
    with pytest.raises(ValueError, match="stop_strings"):
        build(small_model, peft_config=random_lora(), generation_kwargs=beams | {"stop_strings": ["1"]})


def test_the_model_is_left_as_it_was(build, small_model):
    trainer = build(small_model, peft_config=random_lora(), max_steps=1, **STOP)
    trainer.train()
    assert "generate" not in vars(small_model)
    assert trainer.generation_config.stop_strings == ["1", "2"]
