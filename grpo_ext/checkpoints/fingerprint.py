"""Fingerprint of a run: its model, adapter, data, and every setting that can change its trajectory.

    fingerprint(trainer)                {"base_model": "Qwen/Qwen2.5-0.5B", "weights": "9f86d081", "r": 16, ...}
    differences(saved, now)             ["r"]
    explain_differences(["r"], ...)     "The checkpoint was made with r=16; this run has r=32. Start without ..."

It covers the fields that TRL and this project add to transformers' arguments, except `MAY_DIFFER`, and the fields of
transformers in `COMPARED_TRAINING_ARGUMENTS`. It ignores the length of the run (`max_steps`, `num_train_epochs`),
logging, saving, evaluation and publishing, and settings that only change rounding (`chunk_tokens`,
`gradient_checkpointing`, workers, keeping or skipping dead groups). If the length changes, schedules that depend on it
(learning rate, temperature) continue with the new length.
"""

import difflib
import hashlib
import json
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import GRPOTrainer

from grpo_ext.config import GRPOExtConfig
from grpo_ext.model.adapters import local_shard

COMPARED_TRAINING_ARGUMENTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "full_determinism", "bf16", "fp16", "tf32"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "weight_decay"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"),
)
# Fields of `GRPOConfig` and `GRPOExtConfig` that do not change the trajectory, except for rounding.
MAY_DIFFER = {
    *("log_completions", "log_multimodal", "log_unique_prompts", "log_completions_hub_repo"),
    *("num_completions_to_print", "num_generations_eval", "trust_remote_code", "ds3_gather_for_generation"),
    *("chunk_tokens", "reward_workers", "reward_timeout", "guards", "dry_run", "kl_stop"),
    *("max_hours", "accept_changes"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
    "start_pass_rates",  # a checkpoint has the pass rates of its step
    "model_init_kwargs",  # compared by their effect: the weights, the dtype and the config of the model
}
# Values that give the same trajectory, so that one may replace another.
SAME_TRAJECTORY = {"dead_groups": ("keep", "skip")}
# Settings that reach a resumed run through its optimizer and its learning rate schedule.
OPTIMIZER_SETTINGS = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
}
# Settings that the state in a checkpoint depends on.
FIXED = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "steps_per_generation"),
    *("generation_batch_size", "num_iterations", "sync_ref_model", "bf16", "fp16"),
    *("optim", "optim_args", "optim_target_modules"),
}
# Facts whose change a user may accept.
ACCEPTABLE = {field.name for field in fields(GRPOExtConfig)} - {field.name for field in fields(TrainingArguments)}
ACCEPTABLE = (ACCEPTABLE | {*COMPARED_TRAINING_ARGUMENTS, "train_dataset", "reward_funcs"}) - MAY_DIFFER - FIXED
# Fields of an adapter's config that do not define the adapter: the location of its base, and bookkeeping of PEFT.
ADAPTER_MAY_DIFFER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# Fields of a model's config that do not define the model.
MODEL_MAY_DIFFER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
SAMPLED_ROWS, SAMPLED_WEIGHTS = 64, 4096
MAX_SHOWN = 120  # characters of a value in a message


def fingerprint(trainer: GRPOTrainer) -> dict[str, Any]:
    """The fingerprint of a trainer that has not trained yet, as JSON values, the most informative facts first."""
    model, args = trainer.model, trainer.args
    model_config = {
        k: v for k, v in model.config.to_dict().items() if k not in MODEL_MAY_DIFFER and "token_id" not in k
    }
    base = [p for name, p in model.named_parameters() if not _belongs_to_adapter(model, name)]
    facts = {
        "base_model": model.config.name_or_path,
        "weights": _digest(*(_sample_digest(local_shard(parameter)) for parameter in base)),
        "model_config": _digest(json.dumps(model_config, sort_keys=True, default=str)),
        "dtype": str(base[0].dtype).removeprefix("torch."),
    }
    if hasattr(model, "peft_config"):
        adapter = next(iter(model.peft_config.values())).to_dict()  # any other adapter is a reference
        facts |= {name: adapter[name] for name in sorted(adapter, key=_r_first) if name not in ADAPTER_MAY_DIFFER}
    facts |= {"number of processes": args.world_size, "device": trainer.accelerator.device.type}
    facts |= {"train_dataset": _dataset_digest(trainer.train_dataset), "reward_funcs": trainer.reward_func_names}
    ours = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)} - MAY_DIFFER
    facts |= {name: getattr(args, name) for name in [*COMPARED_TRAINING_ARGUMENTS, *sorted(ours)]}
    return json.loads(json.dumps(facts, default=_as_json))


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of the facts that differ between a checkpoint and a run.

    Options that did not exist when the checkpoint was made are not compared. The name of the base model may change: the
    same weights may have moved.
    """
    return [name for name in saved if name != "base_model" and name in now and not _same(name, saved[name], now[name])]


def explain_differences(names: list[str], saved: dict[str, Any], now: dict[str, Any]) -> str:
    """An error message about the first of these differences that cannot be accepted, or the first one of all."""
    name = next((name for name in names if name not in ACCEPTABLE), names[0])
    was, now_is = (f"{name}={_shown(*values)}" for values in ((saved[name], now[name]), (now[name], saved[name])))
    if name == "weights":
        was, now_is = (f"base_model={facts['base_model']} (weights {facts['weights']})" for facts in (saved, now))
    message = f"The checkpoint was made with {was}; this run has {now_is}. Start without resume_from_checkpoint, "
    if name not in ACCEPTABLE:
        return f"{message}or restore {was}."
    return f"{message}restore {was}, or accept what has changed: --accept_changes {','.join(names)}"


def accepted_names(text: str | None) -> list[str]:
    """The names in `accept_changes`.

    Raises:
        ValueError: one of them is no fact of a run, or one that a checkpoint cannot be resumed without.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in ACCEPTABLE:
            near = difflib.get_close_matches(name, sorted(ACCEPTABLE)) or sorted(OPTIMIZER_SETTINGS)
            raise ValueError(
                f"accept_changes: {name!r} is not a setting whose change can be accepted. Close to it: "
                f"{', '.join(near)}. The model, the adapter, the optimizer and the shape of a rollout cannot change."
            )
    return names


def _same(name: str, saved: Any, now: Any) -> bool:
    interchangeable = SAME_TRAJECTORY.get(name, ())
    return saved == now or (saved in interchangeable and now in interchangeable)


def _shown(value: Any, other: Any) -> str:
    """A value as text of up to `MAX_SHOWN` characters; of two lists, only the entries that the other one lacks."""
    if isinstance(value, list) and isinstance(other, list):
        value = [entry for entry in value if entry not in other] or value
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _belongs_to_adapter(model: nn.Module, name: str) -> bool:
    return any(f".{adapter}." in f"{name}." for adapter in getattr(model, "peft_config", ()))


def _r_first(name: str) -> tuple[bool, str]:
    return name != "r", name


def _sample_digest(parameter: Tensor) -> str:
    """Shape of a parameter and hash of its first values; two different models differ in some of them."""
    first = parameter.detach().flatten()[:SAMPLED_WEIGHTS].cpu().contiguous()
    return f"{tuple(parameter.shape)} {hashlib.sha256(first.view(torch.uint8).numpy().tobytes()).hexdigest()}"


def _dataset_digest(dataset: Any) -> str:
    if not isinstance(dataset, Dataset):
        return type(dataset).__name__
    every = max(1, len(dataset) // SAMPLED_ROWS)
    rows = [json.dumps(dataset[i], sort_keys=True, default=_as_json) for i in range(0, len(dataset), every)]
    return f"{len(dataset)} rows ({_digest(*rows)})"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _as_json(value: Any) -> Any:
    """Sets become sorted lists; other values that JSON cannot hold, such as images, become the name of their type."""
    return sorted(value) if isinstance(value, set) else type(value).__name__
