"""Two processes train the adapter that one process trains on the same completions, however groups are distributed, and
a resumed run of theirs equals the uninterrupted one bit by bit."""

import socket
from pathlib import Path

import pytest
import torch

from grpo_ext.checkpoints import files
from tests.distributed import two_processes, two_resumed
from tests.distributed.two_processes import CASES, STEPS, train
from tests.tools.metrics import comparable
from tests.tools.models import random_lora
from tests.tools.paths import ROOT
from tests.tools.processes import in_two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder with the results of every case in both processes. Each is launched as a machine of its own, with the
    documented command: if a rank or address were not passed on, each would train alone or wait for the other."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ROOT / "accelerate_configs" / "multi_gpu.yaml"
    command = f"--config_file {config} --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1"
    commands = [f"{command} --main_process_port {port} --machine_rank {rank}" for rank in (0, 1)]
    in_two_processes(two_processes.__file__, folder, commands)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two, case, tmp_path):
    """Gradients that bypass the hooks of data-parallel training would give each process a different adapter. Rewards or
    normalisers that are not gathered would train the wrong adapter. Neither raises an error."""
    first, second = (torch.load(two / f"{case}-{process}.pt") for process in (0, 1))
    for name, value in first["adapter"].items():
        assert torch.equal(value, second["adapter"][name]), f"{name} differs between the processes"
    alone = train(case, 1, tmp_path)
    settings = CASES[case][1]
    is_bf16 = settings.get("bf16", False)
    assert first["shares"] is second["shares"] is alone["shares"] is settings.get("share_prompt", True)
    assert len(alone["grad_norm"]) == settings.get("max_steps", STEPS)
    for name, value in alone["adapter"].items():
        torch.testing.assert_close(first["start"][name], alone["start"][name], atol=0, rtol=0)
        moved = (value - alone["start"][name]).abs().max()
        assert moved > 5e-4, f"{name} moved by only {moved:.1e}, so agreement to 5e-6 proves little"
        rounding = 0.05 * moved if is_bf16 else 5e-6
        torch.testing.assert_close(first["adapter"][name], value, atol=float(rounding), rtol=0, msg=name)
    assert max(alone["grad_norm"]) > 0
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.02 if is_bf16 else 1e-4)
    for name in ("reward", "reward_std"):
        assert first[name] == pytest.approx(alone[name], abs=1e-6)
    assert max(alone["reward_std"]) > 0
    assert first["effect"] == pytest.approx(alone["effect"], abs=1e-6)
    assert max(alone["effect"]) > 0
    want_chunks = STEPS * settings.get("gradient_accumulation_steps", 1) if "chunk_tokens" in settings else 0
    want_chunks += 2 if settings.get("chunk_tokens") == "auto" else 0  # one row and two rows are measured first
    assert alone["updates_in_chunks"] == want_chunks
    if settings.get("dead_groups") != "skip":  # a process without live rows runs no chunks
        assert first["updates_in_chunks"] == want_chunks
        assert second["updates_in_chunks"] == (0 if case == "one_idle" else want_chunks)


@pytest.mark.parametrize("case", two_resumed.CASES)
def test_two_processes_resume_exactly(two, case):
    """Each process has its own rows, random state and entropies. Both share the order of prompts."""
    folder = two / "resumed"
    assert files.why_unusable(folder / case / "checkpoint-5") is None
    for process in (0, 1):
        whole, again = (torch.load(folder / f"{case}-{kind}-{process}.pt") for kind in ("whole", "again"))
        assert again["seen"] == {step: rows for step, rows in whole["seen"].items() if step >= 5}
        for name, value in whole["adapter"].items():
            assert torch.equal(again["adapter"][name], value), name
    assert comparable(folder / f"{case}-again" / "metrics.jsonl") == comparable(folder / case / "metrics.jsonl")


def test_one_process_cannot_resume_a_run_of_two(two, build, small_model):
    trainer = build(small_model, peft_config=random_lora())
    with pytest.raises(ValueError, match="made with number of processes=2, and cannot continue on 1: this run"):
        trainer.train(resume_from_checkpoint=str(two / "resumed" / "rollouts" / "checkpoint-5"))
