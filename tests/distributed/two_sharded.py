"""The runs that test_sharded.py checks, in two processes that shard parameters or optimizer states and run this file.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/distributed/two_sharded.py FOLDER

writes FOLDER/given-<process>.pt, the folders of a whole and of a resumed run, and messages of refused settings.
accelerate supports FSDP on accelerators only, and would silently use DDP here. Told that these are GPU processes, it
shards on the CPU, over gloo, with the same code. DeepSpeed has its own CPU backend, which accelerate uses without
`use_cpu`.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.model.adapters import local_shard, trainable_parameters
from grpo_ext.recipes import math
from tests.distributed.two_processes import LONGEST, QUESTIONS, SIBLINGS, STEPS, given_completions
from tests.tools.models import random_lora
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import share_of_digits
from tests.tools.training import SETTINGS, adapter_of

ROWS = 8  # in all processes together
USES_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
# Nine problems in batches of four are two batches in one process and one in the other.
RECIPE = "--max_steps 2 --save_steps 1 --eval_steps 1 --max_eval_prompts 9 --per_device_eval_batch_size 4"
RECIPE += " --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --eval_samples 0 --bf16 false"
RECIPE += f" --use_cpu {str(not USES_DEEPSPEED).lower()} --disable_tqdm true --report_to none"


def full(adapter: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter unsharded, in every process."""
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in adapter.items()}


def train(processes: int, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train the embedded model on given completions, with SGD, whose steps are proportional to the gradients."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    trainer = GRPOExtTrainer(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL),
        reward_funcs=share_of_digits,
        args=GRPOExtConfig(
            **SETTINGS
            | {
                "output_dir": str(folder),
                "use_cpu": not USES_DEEPSPEED,
                "max_steps": STEPS,
                "num_generations": SIBLINGS,
                "per_device_train_batch_size": ROWS // processes,
                "max_completion_length": LONGEST,
                "learning_rate": 0.5,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "reward_workers": 0,
                "guards": False,  # the adapter changes the model from the start
            }
            | changes
        ),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
        processing_class=tokenizer,
        peft_config=random_lora(lora_alpha=1),
        rollout_func=given_completions,
    )
    assert trainer.accelerator.num_processes == processes
    start = adapter_of(trainer)
    trainer.train()
    trainer.save_model()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "start": start,
        "adapter": full(adapter_of(trainer)),
        "held_here": {name: local_shard(p).numel() for name, p in trainable_parameters(trainer.model).items()},
        "shares": trainer.shares_prompts,
        **{name: [row[name] for row in logs] for name in ("loss", "grad_norm", "kl", "reward")},
    }


def main() -> None:
    folder, process = Path(sys.argv[1]), os.environ["RANK"]
    torch.set_num_threads(1)
    begin = PartialState.__init__

    def on_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with patch.object(PartialState, "__init__", on_accelerators):
        torch.save(train(2, folder / "given"), folder / f"given-{process}.pt")
        try:
            train(2, folder / "followed", sync_ref_model=True, ref_model_sync_steps=1)
        except ValueError as error:
            (folder / f"refused-{process}").write_text(str(error))
        math.main([*RECIPE.split(), "--output_dir", str(folder / "whole")])
        resumed = ["--resume_from_checkpoint", str(folder / "whole" / "checkpoint-1")]
        math.main([*RECIPE.split(), "--output_dir", str(folder / "again"), *resumed])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
