"""A signal that reaches one process, both, or their launcher ends a run of two processes at one step."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from grpo_ext.checkpoints import files
from tests.distributed import two_stopped
from tests.tools.paths import ROOT
from tests.tools.processes import BIN, in_two_processes
from tests.tools.waiting import PATIENCE, becomes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
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


def test_a_signal_to_the_launcher(tmp_path):
    """torchrun passes SIGTERM on to its processes, and waits for them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        str(BIN / "torchrun"),
        "--nproc_per_node",
        "2",
        "-m",
        "grpo_ext.recipes.math",
        "--output_dir",
        str(tmp_path),
    ]
    command += "--max_steps 500 --per_device_train_batch_size 8 --max_completion_length 16 --max_eval_prompts 8".split()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    log = tmp_path / "metrics.jsonl"
    run = subprocess.Popen(command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)
    assert becomes(lambda: run.poll() is not None or (log.exists() and '"loss"' in log.read_text()))
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=PATIENCE)
    (line,) = [line for line in output.splitlines() if line.startswith("stopped by SIGTERM after step ")]
    assert "torchrun --nproc_per_node 2 -m grpo_ext.recipes.math --output_dir " in line
    assert line.endswith("--max_eval_prompts 8 --resume_from_checkpoint last")
    assert files.find_checkpoint("last", tmp_path) is not None
