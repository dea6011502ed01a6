"""The temperature over a run: schedules by hand, in every log-prob of its rows, near its target, and after a resume."""

import copy
import math

import pytest
import torch

from grpo_ext.losses.temperature import EntropyController, linear_temperature
from tests.tools.models import random_lora
from tests.tools.training import adapter_of, log_of


def train(build, model, **settings):
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **settings)
    trainer.train()
    return trainer


def test_linear_by_hand():
    assert [linear_temperature(0.8, 1.2, step, 5) for step in range(5)] == pytest.approx([0.8, 0.9, 1.0, 1.1, 1.2])
    assert linear_temperature(0.8, 1.2, 0, 1) == 0.8
    assert linear_temperature(0.8, 1.2, 9, 5) == 1.2


def test_controller_by_hand():
    """One nat above the target cools by exp(-0.2). The bounds are half and twice the start. NaN changes nothing."""
    controller = EntropyController(start=0.8, target=1.0, temperature=0.8)
    assert controller.update(2.0) == pytest.approx(0.8 * math.exp(-0.2))
    assert controller.update(math.nan) == controller.temperature == pytest.approx(0.6549846)
    assert controller.update(100.0) == 0.4
    assert controller.update(-100.0) == 1.6


def test_controller_finds_its_target():
    """On a softmax of fixed logits, whose entropy the temperature determines."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    controller = EntropyController(start=1.0, target=1.1, temperature=1.0)

    def entropy():
        return torch.distributions.Categorical(logits=logits / controller.temperature).entropy().item()

    assert abs(entropy() - 1.1) > 0.1
    for _ in range(40):
        controller.update(entropy())
    assert entropy() == pytest.approx(1.1, abs=0.01)


@pytest.mark.parametrize("loss_type", ["grpo_sequence", "dapo"])
def test_rows_keep_the_temperature_that_they_were_sampled_at(build, small_model, loss_type):
    """With two optimizer steps per rollout, the log-probs of its rows are computed at its temperature in both, and so
    are those of the sampler."""
    settings = {"loss_type": loss_type, "temperature": 0.6, "temperature_schedule": "linear", "temperature_end": 1.4}
    trainer = build(copy.deepcopy(small_model), peft_config=random_lora(), num_iterations=2, max_steps=5, **settings)
    seen = []
    score = trainer._get_per_token_logps_and_entropies

    def watched(model, ids, mask, C, *args, **kwargs):
        scored = score(model, ids, mask, C, *args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -C - 1 : -1]
            for temperature in (0.6, 1.0, 1.4):
                logps = (logits / temperature).log_softmax(-1).gather(2, ids[:, -C:].unsqueeze(2)).squeeze(2)
                gap = ((logps - scored[0]) * mask[:, -C:]).abs().max().item()
                seen.append((temperature, gap))
        return scored

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    # rollouts before the steps 0, 2 and 4 of 5: 0.6, 1.0, 1.4
    closest = [min(seen[i : i + 3], key=lambda pair: pair[1]) for i in range(0, len(seen), 3)]
    assert [temperature for temperature, _ in closest] == [0.6, 0.6, 1.0, 1.0, 1.4]
    assert max(gap for _, gap in closest) < 1e-4
    assert log_of(trainer, "temperature") == pytest.approx([0.6, 1.0, 1.4])
    assert max(log_of(trainer, "sampling/logp_gap")) < 1e-3


def test_completions_are_sampled_at_it(build, small_model):
    """From nearly greedy, with equal siblings, to warm, with different ones."""
    settings = {"temperature": 1e-3, "temperature_schedule": "linear", "temperature_end": 2.0, "learning_rate": 1e-9}
    trainer = build(small_model, peft_config=random_lora(), max_steps=2, **settings)
    distinct = []
    generate = trainer._generate_single_turn

    def watched(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        distinct.append([len({tuple(ids) for ids in sampled[0][start : start + 4]}) for start in (0, 4)])
        return sampled

    trainer._generate_single_turn = watched
    trainer.train()
    assert distinct == [[1, 1], [4, 4]]


def test_a_flat_schedule_is_a_constant(build, small_model):
    constant = train(build, small_model, temperature=0.9, max_steps=3)
    flat = train(build, small_model, temperature=0.9, temperature_schedule="linear", temperature_end=0.9, max_steps=3)
    for name, value in adapter_of(constant).items():
        assert torch.equal(adapter_of(flat)[name], value), name


@pytest.mark.parametrize(("target", "direction"), [(0.5, -1), (6.0, 1)])
def test_entropy_moves_towards_its_target(build, small_model, target, direction):
    """The entropy of a random model, about 3.5 nats, is between the two targets."""
    trainer = train(
        build,
        small_model,
        temperature=0.8,
        temperature_schedule="entropy",
        temperature_entropy_target=target,
        max_steps=5,
        learning_rate=1e-6,
    )
    temperatures, entropies = log_of(trainer, "temperature"), log_of(trainer, "entropy")
    assert temperatures[0] == 0.8
    for before, after, entropy in zip(temperatures, temperatures[1:], entropies, strict=False):
        want = EntropyController(start=0.8, target=target, temperature=before).update(entropy)
        assert after == pytest.approx(want, rel=1e-4)
        assert (after - before) * direction >= 0
    assert (entropies[-1] - entropies[0]) * direction > 0


def test_a_resumed_run_continues_at_its_temperature(build, small_model, tmp_path):
    settings = {"temperature_schedule": "entropy", "temperature_entropy_target": 1.0, "output_dir": str(tmp_path / "a")}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(build, small_model, **settings)
    again = build(copy.deepcopy(small_model), peft_config=random_lora(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.state.global_step == 4
    want = whole.parts.temperature.temperature
    assert want < 0.7
    assert log_of(again, "temperature")[2] <= log_of(whole, "temperature")[2]


def test_refused_if_prompts_are_not_shared(build, small_model):
    small_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="temperature_schedule='linear' needs shared prompts"):
        train(build, small_model, temperature_schedule="linear", temperature_end=1.0)
