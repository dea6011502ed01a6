"""Runs that a signal or `max_hours` ends: a complete checkpoint, from which the run continues exactly."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_ext import cli
from grpo_ext.checkpoints import files
from grpo_ext.checkpoints.stop import Stopped
from tests.checkpoints.killed_runs import RUN
from tests.tools.lanes import THOROUGH, thinned
from tests.tools.metrics import comparable
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import ROOT
from tests.tools.reward_functions import PROMPTS, half_dead
from tests.tools.training import adapter_of
from tests.tools.waiting import PATIENCE, becomes

SEED, SIGNALS = 0, 24 if THOROUGH else 6


@pytest.fixture
def session(build, tokenizer, tmp_path):
    """`session(folder)` builds a trainer that uses everything that a checkpoint must contain, without regular saves."""

    def make(folder="run", **changes):
        settings = RUN | {"max_steps": 24, "save_strategy": "no", "enable_jit_checkpoint": True, "reward": half_dead}
        settings |= {"prompts": PROMPTS * 3, "eval_strategy": "steps", "eval_steps": 5}
        settings |= {"arguments": {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})}}
        settings |= {"output_dir": str(tmp_path / folder), "peft_config": random_lora()}
        return build(small_llama(tokenizer), **settings | changes)

    return make


class Starts(TrainerCallback):
    """Starts a timer once training has begun."""

    def __init__(self, timer):
        self.timer = timer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.timer.ident is None:
            self.timer.start()


def sending(trainer, hook, number=signal.SIGTERM, at=3):
    """Send the signal to this process in the middle of the n-th call of a method of the trainer."""
    method, calls = getattr(trainer, hook), []

    def interrupted(*args, **kwargs):
        calls.append(hook)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(trainer, hook, interrupted)


def assert_same_run(trainer, whole, path):
    assert trainer.state.global_step == whole.state.global_step
    for name, value in adapter_of(trainer).items():
        assert torch.equal(value, adapter_of(whole)[name]), name
    assert comparable(path / "run" / "metrics.jsonl") == comparable(path / "whole" / "metrics.jsonl")


@pytest.mark.slow
def test_signals_at_random_moments(session, tmp_path):
    """The resumed sessions together train the adapter of the uninterrupted run, and log the same lines."""
    rng, whole = random.Random(SEED), session("whole")
    began = time.monotonic()
    whole.train()
    seconds = time.monotonic() - began
    stops, is_finished = 0, True
    while stops < SIGNALS or not is_finished:
        if is_finished:  # interrupt another run
            for folder in files.list_checkpoints(tmp_path / "run"):
                files.remove(folder)
        trainer = session()
        delay = rng.random() * seconds / 2
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
        if stops < SIGNALS:
            trainer.add_callback(Starts(timer))
        trainer.train(resume_from_checkpoint="last")
        timer.cancel()
        is_finished = trainer.stop.reason is None
        if is_finished:
            assert_same_run(trainer, whole, tmp_path)
        else:
            stops += 1
            assert files.why_unusable(trainer.last_checkpoint) is None
            assert files.step_of(trainer.last_checkpoint) == trainer.state.global_step


@pytest.mark.parametrize(
    ("hook", "at", "changes"),
    [
        ("_generate_single_turn", 3, {}),
        ("compute_loss", 6, {}),
        ("evaluate", 1, {}),
        ("_save_checkpoint", 2, {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}),
        ("training_step", 4, {"prompts": PROMPTS, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
        ("training_step", 3, {"prompts": PROMPTS, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
    ],
    ids=["generation", "update", "evaluation", "save", "last step of an epoch", "in an epoch"],
)
def test_a_signal_during_each_phase(session, tmp_path, hook, at, changes):
    whole = session("whole", max_steps=9, **changes)
    whole.train()
    first = session(max_steps=9, **changes)
    sending(first, hook, at=at)
    first.train()
    assert first.stop.reason == "SIGTERM"
    assert first.state.global_step < 9
    assert files.find_checkpoint("last", tmp_path / "run") == first.last_checkpoint
    second = session(max_steps=9, **changes)
    second.train(resume_from_checkpoint="last")
    assert second.stop.reason is None
    assert_same_run(second, whole, tmp_path)


def test_a_time_limit(session, caplog):
    trainer = session(max_hours=1e-6, enable_jit_checkpoint=False)
    trainer.train()
    assert (trainer.stop.reason, trainer.state.global_step) == ("max_hours", 1)
    assert f"stopped by max_hours after step 1 of 24; {trainer.last_checkpoint} is complete." in caplog.text
    with pytest.raises(ValueError, match=r"max_hours=0 must be above 0 hours, for example 3\.5"):
        session(max_hours=0)


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, although a job in the background of a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_plain_script_keeps_its_handlers(session, listening):
    """Ctrl-C raises KeyboardInterrupt, with and without `enable_jit_checkpoint`. Only `train` handles SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for switch in (False, True):
        trainer = session(enable_jit_checkpoint=switch)
        assert trainer.args.enable_jit_checkpoint is switch
        sending(trainer, "compute_loss", signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_before_the_first_step_ends_at_once(session):
    trainer = session()
    sending(trainer, "find_checkpoint", at=1)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert trainer.last_checkpoint is None


# Recipes

STEPS = "--max_steps 6 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_completion_length 16"
FLAGS = [*STEPS.split(), "--max_eval_prompts", "8", "--eval_steps", "4", "--seed", "0"]


def start(*flags):
    """Start the math recipe as a user would; its group gets the signals of a terminal."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "grpo_ext", "train", "math", *FLAGS, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", thinned([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_a_recipe_prints_the_command_that_continues_it(tmp_path, number):
    """The signal goes to the whole process group, as from a terminal or a scheduler: reward workers must survive it."""
    cli.main(["train", "math", *FLAGS, "--output_dir", str(tmp_path / "whole"), "--reward_workers=2"])
    run = start("--output_dir", str(tmp_path / "run"), "--reward_workers=2", "--resume-from-checkpoint", "none")
    assert becomes(lambda: steps_logged(tmp_path / "run") or run.poll() is not None)
    os.killpg(run.pid, number)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + number, output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(rf"stopped by {number.name} after step \d of 6; (\S+) is complete\. To continue: (.*)", last)
    assert found is not None, last
    assert files.why_unusable(tmp_path / "run" / found[1].rpartition("/")[2]) is None
    assert all((tmp_path / "run" / name).exists() for name in ("report.html", "curves.png", "metrics.jsonl"))
    command = shlex.split(found[2])
    assert command[-2:] == ["--resume_from_checkpoint", "last"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=PATIENCE).returncode == 0
    for name in ("adapter_model.safetensors", "summary.json"):
        assert (tmp_path / "run" / name).exists()
    adapters = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole"))
    assert len(set(adapters)) == 1
    assert comparable(tmp_path / "run" / "metrics.jsonl") == comparable(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_recipe_at_once(tmp_path):
    run = start("--output_dir", str(tmp_path), "--max_steps", "500")
    lines = iter(run.stdout.readline, "")
    assert becomes(lambda: steps_logged(tmp_path) or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)
    assert any("Ctrl-C again ends it at once" in line for line in lines)
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=PATIENCE)
    assert run.returncode == -signal.SIGINT


@pytest.mark.slow
def test_a_recipe_that_has_no_checkpoint_yet(tmp_path):
    run = start("--output_dir", str(tmp_path))
    for line in iter(run.stdout.readline, ""):
        if "held out" in line:  # the banner
            break
    os.killpg(run.pid, signal.SIGTERM)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + signal.SIGTERM
    last = output.strip().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM; there is no checkpoint to continue from. To start again: ")
    assert last.endswith(shlex.join([*FLAGS, "--output_dir", str(tmp_path)]))


def test_a_dry_run_is_not_reported_as_stopped(session):
    """Nothing was trained, so there is nothing to continue."""
    trainer = session(dry_run=True, guards=True, max_hours=1e-9)
    trainer.train()
    assert trainer.stop.reason is None
