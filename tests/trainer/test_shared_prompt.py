"""Training on shared prompts: the same as without sharing, for every loss; and each prompt is run only once."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora, small_shape
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, log_of

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def train(build, model, **settings):
    """Train with SGD: unlike Adam, it does not amplify errors of small gradients."""
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), optim="sgd", learning_rate=0.5, **settings)
    start = adapter_of(trainer)
    trainer.train()
    end = adapter_of(trainer)
    assert all(not torch.equal(value, end[name]) for name, value in start.items())
    return end, log_of(trainer, "loss"), log_of(trainer, "grad_norm")


@pytest.mark.parametrize("loss_type", slow_but(LOSSES, ["grpo", "dapo"]))
def test_every_loss_of_trl(build, small_model, loss_type):
    """Stock TRL, and shared prompts in chunks, on the same completions."""
    settings = {"loss_type": loss_type, "beta": 0.1, "temperature": 0.8, "entropy_coef": 0.01, "scale_rewards": "group"}
    settings |= {"disable_dropout": True, "max_grad_norm": 0.5, "num_iterations": 2, "max_steps": 4}
    stock = train(build, small_model, trainer=GRPOTrainer, **settings)
    ours = train(build, small_model, trainer=GRPOExtTrainer, chunk_tokens=40, **settings)
    for name, value in stock[0].items():
        torch.testing.assert_close(ours[0][name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert ours[1] == pytest.approx(stock[1], abs=1e-5)
    assert ours[2] == pytest.approx(stock[2], rel=1e-3)


@pytest.mark.parametrize("loss_type", thinned(["grpo", "grpo_sequence"], ["grpo"]))
def test_mixture_of_experts_with_its_load_balancing_loss(build, tokenizer, loss_type):
    """The load-balancing loss is that of TRL, although each prompt is run once, also in chunks."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**small_shape(tokenizer), **experts))
    settings = {"loss_type": loss_type, "router_aux_loss_coef": 0.5, "beta": 0.1, "max_steps": 3}
    runs = []
    for variant in ({"share_prompt": False}, {}, {"chunk_tokens": 40}):
        trainer = build(
            copy.deepcopy(model), peft_config=random_lora(), optim="sgd", learning_rate=0.5, **settings, **variant
        )
        start = adapter_of(trainer)
        trainer.train()
        runs.append(trainer)
    plain, *shared = runs
    assert not plain.shares_prompts
    assert min(log_of(plain, "aux_loss")) > 0.5
    assert any(not torch.equal(value, start[name]) for name, value in adapter_of(plain).items())
    for run in shared:
        assert run.shares_prompts
        assert log_of(run, "aux_loss") == pytest.approx(log_of(plain, "aux_loss"), rel=1e-5)
        assert log_of(run, "loss") == pytest.approx(log_of(plain, "loss"), abs=1e-5)
        for name, value in adapter_of(plain).items():
            torch.testing.assert_close(adapter_of(run)[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_one_equivalence_class(build, small_model):
    """Over five steps, sharing, chunks, checkpointing and the split into micro-batches do not change training."""
    variants = [
        {"share_prompt": False},
        {},
        {"chunk_tokens": 40},
        {"chunk_tokens": 1},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "chunk_tokens": 40},
    ]
    runs = [train(build, small_model, max_steps=5, **variant) for variant in variants]
    for (adapter, losses, norms), variant in zip(runs[1:], variants[1:], strict=True):
        for name, value in runs[0][0].items():
            torch.testing.assert_close(adapter[name], value, atol=5e-6, rtol=1e-4, msg=f"{name} with {variant}")
        for got, want in ((losses, runs[0][1]), (norms, runs[0][2])):
            differences = torch.tensor(got) - torch.tensor(want)
            assert differences.abs().max() < 1e-4
            assert differences.mean().abs() < 3e-5


def test_a_prompt_is_run_once(build, small_model):
    """Counts the tokens that pass through the backbone in the reference pass and in the update."""
    counts = {}
    for share_prompt in (True, False):
        trainer = build(copy.deepcopy(small_model), peft_config=random_lora(), share_prompt=share_prompt, max_steps=1)
        tokens = []
        embedding = trainer.model.get_input_embeddings()
        score = trainer._get_per_token_logps_and_entropies

        def counted(model, input_ids, attention_mask, *args, tokens=tokens, embedding=embedding, score=score, **kwargs):
            hook = embedding.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].numel()))
            output = score(model, input_ids, attention_mask, *args, **kwargs)
            hook.remove()
            return output

        trainer._get_per_token_logps_and_entropies = counted
        trainer.train()
        counts[share_prompt] = sum(tokens)
        sizes = [part["prompt_ids"].size(1) for part in trainer._buffered_inputs]
        assert sizes
    # two prompts of at most 23 tokens and eight completions of at most 12, twice: reference and policy
    assert counts[True] <= 2 * (2 * 23 + 8 * 12)
    assert counts[False] > 1.6 * counts[True]


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_torch_compile_leaves_shared_scoring_as_it_is(build, small_model, caplog, gradient_checkpointing):
    """Tracing it raises RecursionError with gradient checkpointing, and compiles new graphs in every step without."""
    settings = {"beta": 0.1, "gradient_checkpointing": gradient_checkpointing, "max_steps": 3}
    plain = train(build, small_model, **settings)
    torch.compiler.reset()
    compiled = train(build, small_model, torch_compile=True, torch_compile_backend="eager", **settings)
    assert compiled[1:] == plain[1:]
    assert all(torch.equal(value, plain[0][name]) for name, value in compiled[0].items())
    assert "torch_compile=True has no effect on shared prompts" in caplog.text
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_siblings_stay_together_and_keep_their_rows(build, small_model):
    """Micro-batches of one group: each holds one prompt, and every row keeps its own reference log-probs."""
    trainer = build(
        small_model,
        peft_config=random_lora(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    trainer.train()
    assert len(trainer._buffered_inputs) == 4
    for part in trainer._buffered_inputs:
        assert len({tuple(ids.tolist()) for ids in part["prompt_ids"]}) == 1
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        with torch.no_grad(), trainer.model.disable_adapter():
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, : part["prompt_ids"].size(1)] = -100
            again = trainer.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        completion = part["completion_ids"].size(1)
        torch.testing.assert_close(part["ref_per_token_logps"], again[:, -completion:], atol=1e-4, rtol=0)


def test_a_loaded_adapter_is_its_own_reference(build, tiny_model, tmp_path):
    """TRL copies a loaded adapter to one named `ref`; the reference pass must use that one."""
    get_peft_model(tiny_model, random_lora()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        tiny_model.__class__.from_pretrained(tiny_model.name_or_path), tmp_path / "adapter"
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trainer = build(model, beta=0.1, max_steps=1)
    assert trainer.shares_prompts
    trainer.train()
    assert abs(log_of(trainer, "kl_sequence")[0]) < 1e-8


def test_noise_that_depends_on_the_forward_is_left_to_trl(build, small_model, caplog):
    """A prompt apart from its completions would get other noise. OPT has a dropout that is no module, which
    `disable_dropout` of TRL does not reach."""
    build(copy.deepcopy(small_model), peft_config=random_lora(), neftune_noise_alpha=5.0)
    assert "TRL's plain path is taken: neftune_noise_alpha adds noise" in caplog.text
    small_model.model.layers[1].self_attn.attention_dropout = 0.1
    build(small_model, peft_config=random_lora())
    assert "TRL's plain path is taken: attention_dropout is on." in caplog.text


def test_unsupported_settings_are_reported_and_train_on_the_plain_path(build, small_model, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = build(
            small_model, peft_config=random_lora(lora_dropout=0.1), disable_dropout=False, prompts=PROMPTS, max_steps=1
        )
    assert not trainer.shares_prompts
    assert "Prompts are not shared between completions, so TRL's plain path is taken: dropout is on." in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1
