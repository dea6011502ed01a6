"""SIGKILL at random moments of real runs: only the work after the last checkpoint is lost."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from grpo_ext.checkpoints import files
from tests.checkpoints import killed_runs
from tests.checkpoints.killed_runs import KILLS, PHASES, RUN
from tests.tools.metrics import comparable
from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

SEED = 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of `killed_runs.py` and its list of kills."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, killed_runs.__file__, str(folder), str(SEED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "kills.json").read_text())


def notes_of(run):
    """The notes of all sessions of a run, in order, except lines that a kill cut short."""
    lines = (run / "seen.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_kills_hit_every_phase(killed):
    _, kills = killed
    print(f"seed {SEED}:", *(f"{kill['run']} {kill['hit']}," for kill in kills))
    assert len(kills) >= KILLS
    assert set(Counter(kill["hit"] for kill in kills)) == set(PHASES)


@pytest.mark.slow
def test_killed_runs_end_like_the_undisturbed_run(killed):
    """The adapter is equal byte by byte, and so are the lines of the log, including held-out accuracy."""
    folder, kills = killed
    lines = comparable(folder / "whole" / "metrics.jsonl")
    assert sum("heldout/pass@1" in line for line in lines) == 1 + RUN["max_steps"] // RUN["eval_steps"]
    adapter = (folder / "whole" / "adapter_model.safetensors").read_bytes()
    for name in {kill["run"] for kill in kills}:
        assert comparable(folder / name / "metrics.jsonl") == lines
        assert (folder / name / "adapter_model.safetensors").read_bytes() == adapter
        assert files.find_checkpoint("last", folder / name).name == f"checkpoint-{RUN['max_steps']}"


@pytest.mark.slow
def test_each_session_trains_on_the_same_rows(killed):
    """Compares tokens, advantages and temperatures of every micro-step of every session, including steps undone by a
    kill. Each session resumes from the last checkpoint reported as saved, or from one that was complete when the kill
    came."""
    folder, kills = killed
    whole = {note["micro_step"]: note["rows"] for note in notes_of(folder / "whole") if "micro_step" in note}
    assert sorted(whole) == list(range(RUN["max_steps"]))
    for name in {kill["run"] for kill in kills}:
        saved, micro_step, sessions = 0, 0, 0
        for note in notes_of(folder / name):
            if "began" in note:
                assert note["began"] in (saved, saved + RUN["save_steps"])
                saved = micro_step = note["began"]  # one micro-step per step
                sessions += 1
            elif "saved" in note:
                saved = note["saved"]
            else:
                assert note["micro_step"] == micro_step
                assert note["rows"] == whole[micro_step]
                micro_step += 1
        assert sessions >= 1
