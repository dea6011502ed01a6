"""One measured run, in its own process: the PPO trainer of TRL 1.5 on a workload with one prompt per step."""

import itertools
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from meters import Peak, peak_meter, release_free_memory, synchronize
from models import causal_lm, force_lengths, prompt_ids, random_lora, scorer, shrink_b, word_tokenizer
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer  # removed from TRL after 1.5
from workloads import Workload

SEED = 1
MIB = 2**20


class WholeSteps(TrainerCallback):
    """Seconds and peak bytes from the end of one step to the end of the next: this trainer has no begin event."""

    def __init__(self, peak: Peak):
        self.peak = peak
        self.seconds: list[float] = []
        self.highest: list[int] = []
        self._since = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.peak.reset()
        self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self._since)
        self.highest.append(self.peak.highest())
        self.peak.reset()
        self._since = time.perf_counter()


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps, and return their time and memory.

    Args:
        spec: `policy` ("lora": an adapter, with the adapter off as the reference; "whole": all weights, and a reference
            model), `workload`, `shape`, `warmup` and `steps`. Value and reward models never have an adapter.
    """
    workload = Workload.from_dict(spec["workload"])
    peak = peak_meter()
    release_free_memory()
    empty = peak.now()
    with tempfile.TemporaryDirectory() as folder:
        meter = WholeSteps(peak)
        trainer = _trainer(spec, workload, meter, folder)
        release_free_memory()
        before = peak.now()
        trainer.train()
    early_ends = [row["val/num_eos_tokens"] for row in trainer.state.log_history if "val/num_eos_tokens" in row]
    if early_ends != [0] * (spec["warmup"] + spec["steps"]):
        raise RuntimeError(
            f"numbers of EOS tokens in the responses of each step: {early_ends}; expected 0 in every step"
        )
    return {
        "seconds": [{"step": seconds} for seconds in meter.seconds[spec["warmup"] :]],
        "peak_mib": {"step": (max(meter.highest[spec["warmup"] :]) - before) / MIB},
        "weights_mib": (before - empty) / MIB,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "memory_meter": type(peak).__name__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch_threads": torch.get_num_threads(),
        "trl": trl.__version__,
        "logged": trainer.state.log_history,
    }


def _trainer(spec: dict[str, Any], workload: Workload, meter: WholeSteps, folder: str) -> PPOTrainer:
    shape, rows = spec["shape"], workload.rows
    steps = spec["warmup"] + spec["steps"]
    has_adapter = spec["policy"] == "lora"
    policy = causal_lm(shape, SEED)
    no_end = tuple(length + 1 for length in workload.completions)  # EOS would follow the response
    force_lengths(policy, itertools.repeat(no_end))
    prompts = prompt_ids([workload] * steps, shape["vocab_size"], SEED)
    dataset = Dataset.from_dict({"input_ids": [ids for ids in prompts for _ in range(rows)]})
    args = PPOConfig(
        folder,
        num_ppo_epochs=1,
        num_mini_batches=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        total_episodes=steps * rows,
        response_length=max(workload.completions),
        num_sample_generations=0,
        temperature=0.8,
        learning_rate=1e-5,
        optim="adamw_torch",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=word_tokenizer(shape["vocab_size"]),
        model=policy,
        ref_model=None if has_adapter else causal_lm(shape, SEED),
        reward_model=scorer(shape, SEED + 1),
        value_model=scorer(shape, SEED + 2),
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[meter],
        peft_config=random_lora() if has_adapter else None,
    )
    shrink_b(trainer.model)
    return trainer
