"""Runs of two processes: a signal to one or to both ends them at one step, and one process may continue what two
began."""

import json
from pathlib import Path

import pytest
import torch

from grpo_ext.checkpoints import files
from grpo_ext.report.run_reader import read_metrics
from tests.distributed import two_stopped
from tests.tools.paths import ROOT
from tests.tools.processes import in_two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    two_stopped.moved(folder / "one", rows=8).train()
    config = ROOT / "accelerate_configs" / "multi_gpu.yaml"
    in_two_processes(two_stopped.__file__, folder, [f"--config_file {config}"])
    return folder


@pytest.mark.parametrize("case", list(two_stopped.CASES)[1:])
def test_both_processes_stop_at_the_same_step_and_continue_exactly(two, case):
    """If each decided for itself, one would wait for the other for ever."""
    whole = torch.load(two / "whole-0.pt")
    first, second = (torch.load(two / f"{case}-{process}.pt") for process in (0, 1))
    assert first["reason"] == second["reason"] == ("max_hours" if case == "limit" else "SIGTERM")
    assert first["step"] == second["step"] < whole["step"] == 7
    for name, value in whole["adapter"].items():
        assert torch.equal(first["adapter"][name], value), name
        assert torch.equal(second["adapter"][name], value), name


def prompts_of(folder):
    """The prompts of each step."""
    rows = map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
    return {row["step"]: sorted(group["prompt"] for group in row["groups"]) for row in rows}


def test_one_process_continues_a_run_of_two_and_two_one_of_one(two, tmp_path):
    """The order of prompts goes on, and so do the optimizer, the schedule and the log."""
    alone = two_stopped.moved(tmp_path / "two-then-one", rows=8)
    alone.train(resume_from_checkpoint=str(two / "two" / "checkpoint-2"))
    whole = prompts_of(two / "one")
    assert len(whole) == 5
    assert len({tuple(prompts) for prompts in whole.values()}) > 1
    assert prompts_of(two / "two") == whole
    logs = [(row["step"], row["learning_rate"]) for row in read_metrics(two / "one" / "metrics.jsonl") if "loss" in row]
    for folder in (tmp_path / "two-then-one", two / "one-then-two"):
        rows = prompts_of(folder)
        assert {step: rows[step] for step in (3, 4, 5)} == {step: whole[step] for step in (3, 4, 5)}
        resumed = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        assert [(row["step"], row["learning_rate"]) for row in resumed] == logs
        assert files.find_checkpoint("last", folder).name == "checkpoint-5"
    first, second = (torch.load(two / f"one-then-two-{process}.pt") for process in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        ("two", {"rows": 4}, "8 and 8. Choose per_device_train_batch_size and gradient_accumulation_steps such that "),
        ("in-rollout", {"rows": 8, "num_iterations": 2}, "it is in the middle of a rollout"),
        ("two", {"rows": 8, "replay_fraction": 0.5, "accept_changes": "replay_fraction"}, "its own state for replay"),
    ],
    ids=["another size", "in a rollout", "replay"],
)
def test_when_another_number_of_processes_cannot_continue(two, tmp_path, folder, settings, message):
    trainer = two_stopped.moved(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"number of processes=2, and cannot continue on 1: .*{message}"):
        trainer.train(resume_from_checkpoint=str(two / folder / "checkpoint-1"))
