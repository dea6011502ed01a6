"""A run that was stopped and resumed is the run that was not, to the bit, whatever was in use when it was saved."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, adapter_of, log_of, random_lora, share_of_digits, small_llama

from grpo_ext.report.metrics import read_metrics

# Of the log: what depends on the machine and on how busy it is.
TIMES = ("time/", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def comparable(path):
    """The lines of a metrics file, sorted, without times; texts, so that null equals null."""
    rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(path)]
    return [json.dumps(row, sort_keys=True) for row in rows]


def half_dead(prompts, completions, **columns):
    """Two of the four prompts always earn the same."""
    scores = share_of_digits(completions)
    return [0.5 if prompt in PROMPTS[:2] else score for prompt, score in zip(prompts, scores, strict=True)]


PLAIN = {"per_device_train_batch_size": 4, "num_generations": 4}
MATRIX = {
    "one rollout a step": {},
    "two steps on a rollout": {"num_iterations": 2},
    "rollouts of four steps": PLAIN | {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
    "rollouts of one and a half steps": PLAIN | {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
}


def watch(trainer):
    """Of each micro-step of the run, the tokens that are trained on."""
    seen, compute_loss = {}, trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen[trainer._step] = (inputs["completion_ids"].tolist(), inputs["advantages"].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    return seen


@pytest.fixture
def train(build, tokenizer, tmp_path):
    def run(folder, *, resume=None, reward=half_dead, **settings):
        torch.manual_seed(0)
        trainer = build(
            small_llama(tokenizer),
            peft_config=random_lora(),
            reward=reward,
            output_dir=str(tmp_path / folder),
            **{"max_steps": 7, "save_strategy": "steps", "save_steps": 1} | settings,
        )
        seen = watch(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    return run


@pytest.mark.parametrize("settings", MATRIX.values(), ids=MATRIX)
def test_resumed_is_uninterrupted(train, tmp_path, settings):
    whole, seen = train("whole", **settings)
    adapter, lines = adapter_of(whole), comparable(tmp_path / "whole" / "metrics.jsonl")
    for step in range(1, 7):
        again, seen_again = train("again", resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
        assert seen_again == {k: v for k, v in seen.items() if k in seen_again}
        assert seen_again
        for name, value in adapter_of(again).items():
            assert torch.equal(value, adapter[name]), (step, name)
        assert comparable(tmp_path / "again" / "metrics.jsonl") == lines
