"""Started by test_processes.py in two processes: runs that a signal or a time limit stops, and their continuations.

FOLDER/<case>-<process>.pt      {"reason": ..., "step": ..., "adapter": ...}, after the continuation
FOLDER/two, FOLDER/in-rollout   runs of two processes, for one process to continue
FOLDER/one-then-two             continues the run of one process in FOLDER/one
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import PROMPTS, half_dead
from tests.tools.training import SETTINGS, adapter_of

# For each process, the method in whose n-th call the signal arrives; None for no signal.
CASES: dict[str, tuple[tuple[str, int] | None, ...]] = {
    "whole": (None, None),
    "first": (("_generate_single_turn", 2), None),
    "second": (None, ("_compute_loss", 3)),
    "both, at different steps": (("_generate_single_turn", 3), ("_compute_loss", 2)),
    "limit": (None, None),
}


def trainer_of(case: str, folder: Path) -> GRPOExtTrainer:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    settings = {"output_dir": str(folder / case), "guards": False, "reward_workers": 0, "enable_jit_checkpoint": True}
    settings |= {"num_generations": 4, "max_completion_length": 12, "learning_rate": 1e-2, "max_steps": 7}
    settings |= {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
    return GRPOExtTrainer(
        small_llama(tokenizer),
        reward_funcs=half_dead,
        args=GRPOExtConfig(**SETTINGS | settings | {"max_hours": 1e-6 if case == "limit" else None}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=random_lora(),
    )


def moved(output_dir: Path, rows: int, **settings: Any) -> GRPOExtTrainer:
    """A trainer that continues on another number of processes, with `rows` rows per process and 8 rows per rollout."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    common = {"output_dir": str(output_dir), "guards": False, "reward_workers": 0, "save_strategy": "steps"}
    common |= {"save_steps": 1, "num_generations": 4, "max_completion_length": 12, "max_steps": 5}
    return GRPOExtTrainer(
        small_llama(tokenizer),
        reward_funcs=half_dead,
        args=GRPOExtConfig(**SETTINGS | common | {"per_device_train_batch_size": rows} | settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
        processing_class=tokenizer,
        peft_config=random_lora(),
    )


def train(case: str, folder: Path, process: int) -> dict[str, Any]:
    trainer, moment = trainer_of(case, folder), CASES[case][process]
    if moment is not None:
        hook, at = moment
        method, calls = getattr(trainer, hook), []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(hook)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return method(*args, **kwargs)

        setattr(trainer, hook, interrupted)
    trainer.train()
    result = {"reason": trainer.stop.reason, "step": trainer.state.global_step}
    if result["reason"] is not None:
        trainer = trainer_of(case, folder)
        trainer.stop = trainer_of("whole", folder).stop  # without a limit
        trainer.train(resume_from_checkpoint="last")
    return result | {"adapter": adapter_of(trainer)}


def main() -> None:
    folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(train(case, folder, process), folder / f"{case}-{process}.pt")
    moved(folder / "two", rows=4).train()
    moved(folder / "in-rollout", rows=4, num_iterations=2, max_steps=1).train()
    trainer = moved(folder / "one-then-two", rows=4)
    trainer.train(resume_from_checkpoint=str(folder / "one" / "checkpoint-2"))
    torch.save(adapter_of(trainer), folder / f"one-then-two-{process}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
