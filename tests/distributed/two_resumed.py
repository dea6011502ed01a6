"""Runs of two processes, each case whole and resumed halfway, which test_processes.py compares."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import PROMPTS, half_dead
from tests.tools.training import SETTINGS, adapter_of, record_updates

# Rows per process. A rollout serves four steps, which are one epoch, so step 5 is in the second one.
LONG: dict[str, Any] = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "rollouts": LONG,
    "replayed": LONG | {"replay_fraction": 0.5, "dead_groups": "resample", "max_resample_rounds": 1},
    "pools": LONG | {"curriculum": "pools"},
    "by entropy": LONG | {"temperature_schedule": "entropy", "temperature_entropy_target": 4.5},
    "reference": {"per_device_train_batch_size": 4, "num_iterations": 2, "sync_ref_model": True},
}


def train(case: str, output_dir: Path, resume: Path | None = None) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    settings = SETTINGS | {
        "guards": False,
        "reward_workers": 0,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 5,
        "output_dir": str(output_dir),
    }
    settings |= {"num_generations": 4, "max_completion_length": 12, "learning_rate": 1e-2, "ref_model_sync_steps": 2}
    trainer = GRPOExtTrainer(
        small_llama(tokenizer),
        reward_funcs=half_dead,
        args=GRPOExtConfig(**settings | CASES[case]),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=random_lora(),
    )
    assert trainer.accelerator.num_processes == 2
    seen = record_updates(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {"adapter": adapter_of(trainer), "seen": seen}


def train_all(folder: Path, process: int) -> None:
    """Write <case>-whole-<process>.pt and <case>-again-<process>.pt into the folder: the adapter of this process, and
    the completions and advantages that it was trained on."""
    folder.mkdir(exist_ok=True)
    for case in CASES:
        torch.save(train(case, folder / case), folder / f"{case}-whole-{process}.pt")
        again = train(case, folder / f"{case}-again", folder / case / "checkpoint-5")
        torch.save(again, folder / f"{case}-again-{process}.pt")
