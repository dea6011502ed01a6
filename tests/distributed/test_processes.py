"""Two processes train the adapter that one process trains on the same completions, however groups are distributed."""

import socket

import pytest
import torch

from tests.distributed import two_processes
from tests.distributed.two_processes import CASES, STEPS, train
from tests.tools.paths import ROOT
from tests.tools.processes import in_two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of every case in both processes, from one launch."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(two_processes.__file__, folder)
    return {case: [torch.load(folder / f"{case}-{process}.pt") for process in (0, 1)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two, case, tmp_path):
    """Gradients that bypass the hooks of data-parallel training would give each process a different adapter. Rewards or
    normalisers that are not gathered would train the wrong adapter. Neither raises an error."""
    first, second = two[case]
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
    assert alone["updates_in_chunks"] == want_chunks
    if settings.get("dead_groups") != "skip":  # a process without live rows runs no chunks
        assert first["updates_in_chunks"] == want_chunks
        assert second["updates_in_chunks"] == (0 if case == "one_idle" else want_chunks)


def test_two_machines_train_as_one_process(tmp_path):
    """One launcher per machine, with the documented command. If a rank or address were not passed on, each machine
    would train on its own or wait for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ROOT / "accelerate_configs" / "multi_gpu.yaml"
    command = f"--config_file {config} --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1"
    commands = [f"{command} --main_process_port {port} --machine_rank {rank}" for rank in (0, 1)]
    in_two_processes(two_processes.__file__, tmp_path, "straddling_chunks", options=commands)
    first, second = (torch.load(tmp_path / f"straddling_chunks-{process}.pt") for process in (0, 1))
    alone = train("straddling_chunks", 1, tmp_path)
    for name, value in alone["adapter"].items():
        assert torch.equal(first["adapter"][name], second["adapter"][name]), f"{name} differs between the machines"
        assert (value - alone["start"][name]).abs().max() > 5e-4
        torch.testing.assert_close(first["adapter"][name], value, atol=5e-6, rtol=0, msg=name)
