"""Resampled dead groups: which prompts replace them, what TRL receives, and what is counted."""

import copy
import json

import pytest
import torch
from datasets import Dataset

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.tools import training
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, count_draws, log_of, texts_of

SETTINGS = {"per_device_train_batch_size": 16, "max_steps": 3, "beta": 0.0, "num_iterations": 1}


def half_dead(prompts, log_extra, completions, **columns):
    """Equal rewards for all completions of the first and of the third prompt; different ones within other groups."""
    log_extra("seen", list(completions))
    dead = {PROMPTS[0]: 1.0, PROMPTS[2]: 0.0}
    return [dead.get(prompt, 0.1 * (i % 4)) for i, prompt in enumerate(prompts)]


def alive(prompts, **columns):
    return [0.1 * (i % 4) for i, _ in enumerate(prompts)]


def train(build, model, **settings):
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **SETTINGS | settings)
    draws = count_draws(trainer)
    trainer.train()
    return trainer, draws


def test_other_prompts_replace_dead_groups(build, small_model):
    """Two of four prompts per rollout are dead. After enough rounds, every row that TRL receives has an advantage."""
    trainer, draws = train(build, small_model, reward=half_dead, dead_groups="resample", max_resample_rounds=30)
    (part,) = trainer._buffered_inputs
    assert set(trainer._logs["prompt"]) == {PROMPTS[1], PROMPTS[3]}
    assert (part["advantages"].abs() > 0.4).all()
    assert draws[:2] == [16, 8]
    assert log_of(trainer, "resampled_groups") == [2.0] * 3
    # shares are over all sampled groups, not only those that were kept
    groups = [size // 4 for size in draws]
    assert sum(groups) > 12
    assert log_of(trainer, "frac_groups/mixed")[0] == pytest.approx(4 / sum(groups[: draws.index(16, 1)]))
    shares = [log_of(trainer, f"frac_groups/{kind}")[0] for kind in ("mixed", "all_right", "all_wrong")]
    assert sum(shares) == pytest.approx(1)
    assert log_of(trainer, "frac_dead_groups")[0] == pytest.approx(1 - shares[0])


def test_rows_stay_whole(build, small_model):
    """Ids, text, rewards, logged columns and sampled log-probs of a row still belong to one completion."""
    trainer, _ = train(build, small_model, reward=half_dead, dead_groups="resample", num_iterations=2, max_steps=3)
    (part,) = trainer._buffered_inputs
    logs = trainer._logs
    assert list(logs["extra"]["seen"]) == list(logs["completion"])
    assert sorted(texts_of(trainer, part)) == sorted(zip(logs["prompt"], logs["completion"], strict=True))
    assert max(log_of(trainer, "sampling/logp_gap")) < 1e-3


def test_the_number_of_rounds_is_limited(build, small_model):
    """If every group is dead, resampling stops after the allowed rounds, and the run continues with dead groups."""
    trainer, draws = train(
        build, small_model, reward=lambda prompts, **columns: [1.0] * len(prompts), dead_groups="resample", max_steps=2
    )
    assert draws == [16] * 2 * (1 + 3)
    assert log_of(trainer, "resampled_groups") == [0.0, 0.0]
    assert log_of(trainer, "frac_groups/all_right") == [1.0, 1.0]


def test_without_dead_groups_nothing_changes(build, small_model):
    keep, draws = train(build, small_model, reward=alive)
    resample, same_draws = train(build, small_model, reward=alive, dead_groups="resample")
    assert draws == same_draws == [16] * 3
    for name, value in adapter_of(keep).items():
        assert torch.equal(adapter_of(resample)[name], value), name


def test_runs_repeat(build, small_model):
    runs = [train(build, small_model, reward=half_dead, dead_groups="resample") for _ in range(2)]
    (first, draws), (second, same_draws) = runs
    assert draws == same_draws
    assert list(first._logs["completion"]) == list(second._logs["completion"])


def test_refused_if_rows_cannot_be_replaced(tiny_model, tokenizer, tmp_path):
    settings = training.SETTINGS | {"dead_groups": "resample", "max_steps": 1, "reward_workers": 0, "guards": False}
    args = GRPOExtConfig(str(tmp_path), **settings)
    data = Dataset.from_dict({"prompt": PROMPTS})
    for name, keywords in {
        "picks prompts at random, and .*IterableDataset": {"train_dataset": data.to_iterable_dataset()},
        "does not work with rollout_func": {"train_dataset": data, "rollout_func": lambda prompts, trainer: {}},
    }.items():
        with pytest.raises(ValueError, match=f"dead_groups='resample' {name}"):
            GRPOExtTrainer(tiny_model, alive, args, processing_class=tokenizer, peft_config=random_lora(), **keywords)


def test_a_column_that_is_logged_in_some_calls_only(build, small_model, tmp_path):
    """Rows without a value have none, and the values of others stay with their rows."""

    def sometimes(prompts, log_extra, completions, **columns):
        if len(completions) == 16:  # not in further rounds
            log_extra("seen", list(completions))
        return half_dead(prompts, lambda *_: None, completions)

    trainer, draws = train(build, small_model, reward=sometimes, dead_groups="resample", max_resample_rounds=30)
    assert len(set(draws)) > 1
    logs = trainer._logs
    seen = list(logs["extra"]["seen"])
    assert len(seen) == len(logs["completion"]) == 16
    assert None in seen
    assert all(value in (None, text) for value, text in zip(seen, logs["completion"], strict=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
