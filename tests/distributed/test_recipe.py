"""The math recipe in two processes, as `torchrun` starts it in the folder of the script, until a signal ends it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from grpo_ext.checkpoints import files
from tests.tools.paths import ROOT
from tests.tools.processes import BIN
from tests.tools.waiting import PATIENCE, becomes

FLAGS = (
    "--max_steps 500 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_completion_length 16 "
    "--max_eval_prompts 8 --eval_samples 0 --eval_steps 1 --save_steps 1 --reward_workers 0 --dataloader_num_workers 1"
)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of a run that SIGTERM ends after a step. torchrun passes the signal on, and waits.

    The workers of the data loader are spawned: they start with the current folder, recipes/, first on their path, and
    import the script again."""
    folder, site = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("site")
    spawning = "import multiprocessing as m\nm.set_start_method('spawn', force=True)\n"
    (site / "sitecustomize.py").write_text(spawning)
    environment = os.environ | {"PYTHONPATH": f"{site}:{ROOT}", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "math.py", "--output_dir", str(folder), *FLAGS.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT / "recipes", env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)
    log = folder / "metrics.jsonl"
    assert becomes(lambda: launcher.poll() is not None or (log.exists() and '"loss"' in log.read_text()))
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert log.exists(), output
    return folder, output


def test_a_signal_to_the_launcher_stops_both_processes(run):
    folder, output = run
    (line,) = [line for line in output.splitlines() if line.startswith("stopped by SIGTERM after step ")]
    assert "torchrun --nproc_per_node 2 math.py --output_dir " in line
    assert line.endswith("--dataloader_num_workers 1 --resume_from_checkpoint last")
    assert files.find_checkpoint("last", folder) is not None


def test_each_process_samples_its_half_of_a_rollout(run):
    """The gold answers belong to the prompts, and are not those of the other process."""
    folder, output = run
    assert "16 completions (2 prompts x 8)" in output
    rollouts = lines_of(folder / "completions.jsonl")
    assert rollouts
    assert {len(rollout["groups"]) for rollout in rollouts} == {2}
    for group in (group for rollout in rollouts for group in rollout["groups"]):
        assert len(group["answers"]) == 8
        assert int(group["gold"]) == sum(map(int, re.findall(r"\d+", group["prompt"])))
        for answer in group["answers"]:
            assert answer["rewards"]["math_answer_reward"] == float(answer["found"] == group["gold"])


def test_each_process_evaluates_its_half_and_one_prints(run):
    folder, output = run
    assert output.count("held out: 8 problems of split 'test'") == 1
    assert {len(row["right"]) for row in lines_of(folder / "heldout.jsonl")} == {8}
