"""What test_resume.py trains in two processes, each running this file: every case whole, and resumed in its middle.

    accelerate launch --multi_gpu --num_processes 2 tests/distributed/two_resumed.py FOLDER

writes FOLDER/<case>-whole-<process>.pt and FOLDER/<case>-again-<process>.pt, with the adapter of that process and what
it trained on.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.conftest import PROMPTS, SETTINGS, TINY_MODEL, adapter_of, half_dead, random_lora, small_llama

# Rows a process; a rollout serves four steps, and so many are a pass over the prompts: step 5 lies in the second one.
LONG: dict[str, Any] = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "rollouts": LONG,
    "replayed": LONG | {"replay_fraction": 0.5, "dead_groups": "resample", "max_resample_rounds": 1},
    "by entropy": LONG | {"temperature_schedule": "entropy", "temperature_entropy_target": 4.5},
    "reference": {"per_device_train_batch_size": 4, "num_iterations": 2, "sync_ref_model": True},
}


def watch(trainer: GRPOExtTrainer) -> dict[int, Any]:
    """Of each micro-step of the run, the tokens that are trained on, and what they are worth."""
    seen, compute_loss = {}, trainer.compute_loss

    def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen[trainer._step] = inputs["completion_ids"].tolist(), inputs["advantages"].tolist()
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    return seen


def train(case: str, output_dir: Path, resume: Path | None = None) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    settings = SETTINGS | {
        "guards": False,
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
    seen = watch(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {"adapter": adapter_of(trainer), "seen": seen}


def main() -> None:
    folder, process = Path(sys.argv[1]), os.environ["RANK"]
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(train(case, folder / case), folder / f"{case}-whole-{process}.pt")
        again = train(case, folder / f"{case}-again", folder / case / "checkpoint-5")
        torch.save(again, folder / f"{case}-again-{process}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
