"""Dead groups that the update skips by default: the same adapter to the bit, fewer tokens, the same metrics; and when
they are kept."""

import copy
import logging

import pytest
import torch
from torch.nn import Embedding

from grpo_ext.losses.dead_groups import rows_without_advantage
from tests.tools.lanes import slow, slow_but, thinned
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, log_of

SETTINGS = {"beta": 0.0, "entropy_coef": 0.0, "max_steps": 5, "num_generations": 4}


def one_dead_group(prompts, completions, **columns):
    """All completions of the first prompt have equal rewards; those of the others differ."""
    return [
        1.0 if prompt == PROMPTS[0] else float(len(text) % 3) for prompt, text in zip(prompts, completions, strict=True)
    ]


def train(build, model, **settings):
    """The trainer, and the number of tokens that passed through the embedding with gradients."""
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **{"reward": one_dead_group} | SETTINGS | settings)
    tokens = []

    def count(module, inputs, output):
        if trainer.model.training and torch.is_grad_enabled():
            tokens.append(inputs[0].numel())

    (embedding,) = (m for m in trainer.model.modules() if isinstance(m, Embedding))
    hook = embedding.register_forward_hook(count)
    trainer.train()
    hook.remove()
    return trainer, sum(tokens)


ALL_AT_ONCE = {"per_device_train_batch_size": 16}
# Some micro-batches become empty.
ONE_GROUP_AT_A_TIME = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
HALVES = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "chunk_tokens": 40,
    "num_iterations": 2,
}
UPDATES = [
    ("grpo_sequence", ALL_AT_ONCE),
    ("grpo_sequence", ONE_GROUP_AT_A_TIME),
    ("grpo_sequence", HALVES),
    ("grpo", HALVES),
    ("dapo", ALL_AT_ONCE),
    ("cispo", ONE_GROUP_AT_A_TIME),
    *((loss_type, HALVES) for loss_type in ("bnpo", "dr_grpo", "sapo", "luspo", "vespo")),
]


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    slow_but(thinned(UPDATES, [UPDATES[1], UPDATES[3], UPDATES[4], *UPDATES[6:]]), UPDATES[:1]),
)
def test_skip_is_keep_to_the_bit(build, small_model, loss_type, settings):
    settings = {"loss_type": loss_type, **settings}
    keep, all_tokens = train(build, small_model, dead_groups="keep", **settings)
    skip, tokens = train(build, small_model, **settings)
    start = adapter_of(build(copy.deepcopy(small_model), peft_config=random_lora()))
    for name, value in adapter_of(keep).items():
        assert torch.equal(adapter_of(skip)[name], value), name
        assert not torch.equal(start[name], value), name
    assert tokens < 0.85 * all_tokens  # one of four prompts is dead
    assert log_of(skip, "frac_groups/all_right") == [0.25] * len(log_of(skip, "frac_groups/all_right"))
    for name in ("loss", "grad_norm", "frac_dead_groups"):
        assert log_of(skip, name) == log_of(keep, name), name
    for name in ("entropy", "ratio", "clip_ratio/region_mean"):
        assert log_of(skip, name) == pytest.approx(log_of(keep, name), rel=0.1), name


def test_all_dead(build, small_model):
    """If every group is dead, the update runs no tokens and changes no weights."""
    trainer, tokens = train(build, small_model, reward=lambda completions, **columns: [0.5] * len(completions))
    assert tokens == 0
    assert log_of(trainer, "loss") == [0.0] * 5
    start = adapter_of(build(copy.deepcopy(small_model), peft_config=random_lora()))
    assert all(torch.equal(value, start[name]) for name, value in adapter_of(trainer).items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"beta": 0.1}, "beta=0.1"),
        slow(({"entropy_coef": 0.01}, "entropy_coef=0.01")),
        slow(({"log_kl": True}, "log_kl")),
        slow(({"loss_type": "grpo", "top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5")),
        slow(
            ({"temperature_schedule": "entropy", "temperature_entropy_target": 2.0}, "temperature_schedule='entropy'")
        ),
        slow(({"neftune_noise_alpha": 5.0}, "prompts are not shared")),
        slow(({"share_prompt": False}, "prompts are not shared")),
    ],
)
def test_kept_if_skipping_would_change_the_run(build, small_model, caplog, settings, reason):
    """Training is that of `dead_groups="keep"`. The reason is logged if the user asked for "skip", and only then."""
    settings = {"max_steps": 2} | settings
    keep, all_tokens = train(build, small_model, dead_groups="keep", **settings)
    for asked in ({}, {"dead_groups": "skip"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            skip, tokens = train(build, small_model, **settings | asked)
        said = [record.message for record in caplog.records if "dead_groups" in record.message]
        assert [reason in message for message in said] == ([True] if asked else [])
        assert tokens == all_tokens
        for name, value in adapter_of(keep).items():
            assert torch.equal(adapter_of(skip)[name], value), name


def test_an_advantage_per_token_counts_for_its_row():
    """A subclass may set one per token. A row with a single 0, such as on padding, has a gradient."""
    advantages_BC = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, -1.0]])
    assert rows_without_advantage(advantages_BC) == {1}
    assert rows_without_advantage(advantages_BC[:, 0]) == {1, 2}
