"""Started by test_killed.py: one undisturbed run, and the same run killed again and again.

    python tests/checkpoints/killed_runs.py FOLDER SEED

Every session is a fork of this process, which has imported everything and computed nothing. SIGKILL is sent during its
k-th generation, backward pass or save, or between these; k and the delay are random. The next session resumes from the
last checkpoint. This is repeated, over several runs if needed, for KILLS kills. Then the last run is left to finish.

FOLDER/whole, FOLDER/killed-0, ...     output folders; `seen.jsonl` in each records what its sessions trained on
FOLDER/kills.json                      for each kill: the run, the phase it was aimed at, and the phase it hit
"""

import gc
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.evaluation.callback import HeldOutAccuracy
from grpo_ext.evaluation.complete import evaluate
from grpo_ext.report.heldout_file import evaluation_metrics
from tests.tools.lanes import THOROUGH
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import PROMPTS, half_dead, share_of_digits
from tests.tools.training import SETTINGS

KILLS, MAX_KILLS = 20 if THOROUGH else 6, 60  # more than KILLS if some phase was never hit
PHASES = ("other", "generate", "backward", "save")
# Uses everything that a checkpoint must contain; saves in the middle of rollouts.
RUN: dict[str, Any] = {
    "max_steps": 60 if THOROUGH else 36,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "max_completion_length": 12,
    "learning_rate": 1e-2,
    "replay_fraction": 0.5,
    "dead_groups": "resample",
    "max_resample_rounds": 1,
    "chunk_tokens": None,  # each session would measure an update of its own, which the notes would list
    "temperature_schedule": "entropy",
    "temperature_entropy_target": 4.5,
    "sync_ref_model": True,
    "ref_model_sync_steps": 5,
    "eval_steps": 7,
    "guards": False,
    "reward_workers": 0,  # starting a worker would take longer than a session trains
}


class PhaseLog:
    """Memory shared by the sessions and this process: the current phase, and for each phase how many times it began and
    its total seconds."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 + 16 * len(PHASES))

    @property
    def current(self) -> int:
        return self.memory[0]

    def count_and_seconds(self, phase: int) -> tuple[float, float]:
        return struct.unpack_from("dd", self.memory, 8 + 16 * phase)

    def reset(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, phase, started = self.current, PHASES.index(name), time.perf_counter()
        count, seconds = self.count_and_seconds(phase)
        struct.pack_into("dd", self.memory, 8 + 16 * phase, count + 1, seconds)
        self.memory[0] = phase
        yield
        struct.pack_into("dd", self.memory, 8 + 16 * phase, count + 1, seconds + time.perf_counter() - started)
        self.memory[0] = before


class LoggingTrainer(GRPOExtTrainer):
    """Records which phase it is in and what it trains on."""

    phases: PhaseLog
    notes: Path

    def note(self, **values: Any) -> None:
        with self.notes.open("a") as file:
            file.write("\n" + json.dumps(values))  # begins on a new line: a kill may have cut the last one short

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases("generate"):
            return super()._generate(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases("other"):
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        trained_on = inputs["completion_ids"].tolist(), inputs["advantages"].tolist(), inputs["temperature"].tolist()
        self.note(micro_step=self._step, rows=trained_on)
        return super()._compute_loss(model, inputs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.phases("save"):
            super()._save_checkpoint(*args, **kwargs)
        self.note(saved=self.state.global_step)


class NotesFirstStep(TrainerCallback):
    """Notes the step that a session starts from."""

    def __init__(self, trainer: LoggingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note(began=state.global_step)


def session(output_dir: Path, phases: PhaseLog) -> None:
    """One session, always the same code: resume from the last checkpoint, or start."""
    output_dir.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    trainer = LoggingTrainer(
        small_llama(tokenizer),
        reward_funcs=half_dead,
        args=GRPOExtConfig(**SETTINGS | RUN | {"output_dir": str(output_dir)}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 3}),
        processing_class=tokenizer,
        peft_config=random_lora(),
    )
    trainer.phases, trainer.notes = phases, output_dir / "seen.jsonl"
    backward = trainer.accelerator.backward

    def logged_backward(*args: Any, **kwargs: Any) -> None:
        with phases("backward"):
            backward(*args, **kwargs)

    trainer.accelerator.backward = logged_backward
    problems = [{"prompt": prompt} for prompt in PROMPTS]
    settings = {"max_new_tokens": 8, "temperature": 0.8, "samples": 2}
    measure = partial(evaluate, trainer.model, tokenizer, problems, share_of_digits, **settings)
    trainer.add_callback(
        HeldOutAccuracy(measure(), measure, lambda found: trainer.log_alone(evaluation_metrics(found)))
    )
    trainer.add_callback(NotesFirstStep(trainer))
    trainer.train(resume_from_checkpoint="last")
    trainer.save_model()


def fork(output_dir: Path, phases: PhaseLog) -> int:
    child = os.fork()
    if child:
        return child
    try:
        session(output_dir, phases)
        sys.stdout.flush()
        os._exit(0)
    finally:
        os._exit(1)


def has_finished(child: int) -> bool:
    """Whether the session has finished; raises if it failed."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        raise RuntimeError(f"a session ended with status {status}")
    return bool(pid)


def main() -> None:
    folder, rng = Path(sys.argv[1]), random.Random(sys.argv[2])
    phases = PhaseLog()
    os.waitpid(fork(folder / "whole", phases), 0)
    counts, seconds = zip(*(phases.count_and_seconds(phase) for phase in range(len(PHASES))), strict=True)
    kills: list[dict[str, Any]] = []
    runs, output_dir = 0, folder / "killed-0"
    while len(kills) < KILLS or ({kill["hit"] for kill in kills} < set(PHASES) and len(kills) < MAX_KILLS):
        phase = len(kills) % len(PHASES)
        kth = rng.randint(1, {"save": 2, "generate": 3}.get(PHASES[phase], 8))
        wait = rng.random() * 0.7 * seconds[phase] / counts[phase]
        phases.reset()
        child = fork(output_dir, phases)
        finished = False
        while phases.count_and_seconds(phase)[0] < kth and not (finished := has_finished(child)):
            time.sleep(0.0002)
        if finished:  # start another run to kill
            runs += 1
            output_dir = folder / f"killed-{runs}"
            continue
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        hit = PHASES[phases.current]
        os.waitpid(child, 0)
        kills.append({"run": output_dir.name, "aimed_at": PHASES[phase], "hit": hit})
    child = fork(output_dir, phases)
    while not has_finished(child):
        time.sleep(0.01)
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()
    main()
