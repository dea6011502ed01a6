"""One measured run, in its own process: stock TRL's GRPO trainer or ours on a workload."""

import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from meters import PHASES, StepMeter, matmul_flops, peak_meter, release_free_memory
from models import causal_lm, force_lengths, prompt_ids, random_lora, shrink_b, word_tokenizer
from switches import switch_off
from trl import GRPOConfig, GRPOTrainer
from workloads import Workload

import grpo_ext

SEED = 1
MIB = 2**20
LOGGED = ("loss", "grad_norm", "reward", "kl", "num_tokens", "completions/mean_length")


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A number computed from the ids: cheap, the same on both sides, and different within a group."""
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps, and return their time and memory.

    Args:
        spec: `side` ("stock" or "ours"), `workload`, `shape` of the model, `settings` (fields of the config in addition
            to the common ones), `warmup` and `steps`, `warmup_workload` with as many rows as `workload`, `scale` (also
            measure the machine and count operations), `bf16` (frozen weights and autocast, as `fp16` in `settings` for
            float16), `tf32` (float32 products); optionally `load_in_4bit`, `free_lengths` (sample until
            `max_completion_length`, whatever the workload says) and `switched_off` (names in `switches.OFF`).
    """
    if spec["tf32"]:
        torch.set_float32_matmul_precision("high")
    switch_off(spec.get("switched_off", ()))
    workload, short = (Workload.from_dict(spec[name]) for name in ("workload", "warmup_workload"))
    steps = [short] * spec["warmup"] + [workload] * spec["steps"]
    peak = peak_meter()
    release_free_memory()
    empty = peak.now()
    matmul = matmul_flops() if spec["scale"] else None

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, steps, folder)
        meter = StepMeter(peak, count_flops=spec["scale"] and spec["warmup"] > 0)
        meter.watch(trainer)
        release_free_memory()
        before = peak.now()
        trainer.train()

    logged = {name: [row[name] for row in trainer.state.log_history if name in row] for name in LOGGED}
    if not spec.get("free_lengths"):
        _require_lengths(logged["completions/mean_length"], steps)
    seconds, highest = meter.seconds[spec["warmup"] :], meter.highest[spec["warmup"] :]
    if any(phases.keys() != set(PHASES) for phases in seconds):
        raise RuntimeError(f"every step should have the phases {PHASES}; measured: {[dict(step) for step in seconds]}")
    return {
        "seconds": [{"step": sum(phases.values())} | phases for phases in seconds],
        "peak_mib": {phase: max(step[phase] - before for step in highest) / MIB for phase in PHASES},
        "weights_mib": (before - empty) / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB if torch.cuda.is_available() else None,
        "memory_meter": type(peak).__name__,
        "dtypes": {
            "weights": str(trainer.model.get_input_embeddings().weight.dtype),
            "adapter": _adapter_dtype(trainer),
        },
        "float32_products": torch.get_float32_matmul_precision(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch_threads": torch.get_num_threads(),
        "trl": trl.__version__,
        "grpo_ext": {"version": grpo_ext.__version__, "path": grpo_ext.__file__},
        "matmul_flops": matmul,
        "update_flops": meter.update_flops or None,
        "chunk_limits": trainer.parts.scorer.limits.state_dict() if spec["side"] == "ours" else None,
        "logged": logged,
    }


def _trainer(spec: dict[str, Any], steps: list[Workload], folder: str) -> GRPOTrainer:
    workload = steps[-1]
    settings = {"per_device_train_batch_size": workload.rows, "gradient_checkpointing": False} | spec["settings"]
    vocabulary = spec["shape"]["vocab_size"]
    dtype = torch.bfloat16 if spec["bf16"] else torch.float16 if settings.get("fp16") else torch.float32
    lm = causal_lm(spec["shape"], SEED, dtype=dtype, load_in_4bit=spec.get("load_in_4bit", False))
    if not spec.get("free_lengths"):
        force_lengths(lm, [step.completions for step in steps])
    prompts = [" ".join(f"w{i}" for i in ids) for ids in prompt_ids(steps, vocabulary, SEED)]
    config, trainer = GRPOConfig, GRPOTrainer
    if spec["side"] == "ours":
        config, trainer = grpo_ext.GRPOExtConfig, grpo_ext.GRPOExtTrainer
        settings["guards"] = False  # they stop a run whose random adapter differs from its reference
    args = config(
        folder,
        loss_type="grpo",
        scale_rewards="group",
        beta=0.1,
        num_iterations=1,
        temperature=0.8,
        entropy_coef=0.0,
        max_grad_norm=0.5,
        learning_rate=1e-5,
        optim="adamw_torch",
        disable_dropout=True,
        bf16=spec["bf16"],
        use_cpu=not torch.cuda.is_available(),
        num_generations=workload.generations,
        max_completion_length=max(workload.completions),
        gradient_accumulation_steps=workload.rows // settings["per_device_train_batch_size"],
        max_steps=len(steps),
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=SEED,
        **settings,
    )
    made = trainer(
        lm,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=word_tokenizer(vocabulary),
        peft_config=random_lora(),
    )
    shrink_b(made.model)
    return made


def _adapter_dtype(trainer: GRPOTrainer) -> str:
    return str(next(parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad))


def _require_lengths(mean_lengths: list[float], steps: list[Workload]) -> None:
    expected = [sum(step.completions) / step.rows for step in steps]
    if len(mean_lengths) != len(steps) or any(
        abs(mean - length) > 0.01 for mean, length in zip(mean_lengths, expected, strict=True)
    ):
        raise RuntimeError(f"mean completion lengths of the steps are {mean_lengths}; expected {expected}")
