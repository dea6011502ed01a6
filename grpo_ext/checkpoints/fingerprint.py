"""What makes a run the run that it is: its model, adapter, data, and every setting that its trajectory depends on.

    fingerprint(trainer)                {"base_model": "Qwen/Qwen2.5-0.5B", "weights": "9f86d081", "r": 16, ...}
    first_difference(saved, now)        "Checkpoint was made with r=16; this run has r=32. Start without resume, ..."

Compared are all fields that TRL and this project add to transformers' arguments, and those of transformers that are
named here. Not compared: how long the run is (`max_steps`, `num_train_epochs`), what is logged, saved, evaluated and
published, where, and what moves results by rounding only (`chunk_tokens`, `gradient_checkpointing`, workers). With
another length, schedules that depend on it (learning rate, temperature) go on as those of the new length.
"""

import hashlib
import json
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import GRPOTrainer

from grpo_ext.model.adapters import local_shard

OF_TRANSFORMERS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "full_determinism", "bf16", "fp16", "tf32"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "weight_decay"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"),
)
HARMLESS = {
    *("log_completions", "log_multimodal", "log_unique_prompts", "log_completions_hub_repo"),
    *("num_completions_to_print", "num_generations_eval", "trust_remote_code", "ds3_gather_for_generation"),
    *("chunk_tokens", "reward_workers", "reward_timeout", "guards", "dry_run", "kl_stop"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
    "model_init_kwargs",  # what it does is in the weights, the dtype and the config of the model
}
# Of an adapter's config: where its base was found, and what PEFT notes beside.
ADAPTER_HARMLESS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# Of a model's config: what changes without the model being another one.
MODEL_HARMLESS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
SAMPLED_ROWS, SAMPLED_WEIGHTS = 64, 4096
LONGEST_SHOWN = 120  # characters of a value in a message


def fingerprint(trainer: GRPOTrainer) -> dict[str, Any]:
    """Of a trainer that has not trained yet; JSON values, those that a user would look for first come first."""
    model, args = trainer.model, trainer.args
    model_config = {k: v for k, v in model.config.to_dict().items() if k not in MODEL_HARMLESS and "token_id" not in k}
    base = [p for name, p in model.named_parameters() if not _is_adapters(model, name)]
    facts = {
        "base_model": model.config.name_or_path,
        "weights": _digest(*(_some(local_shard(parameter)) for parameter in base)),
        "model_config": _digest(json.dumps(model_config, sort_keys=True, default=str)),
        "dtype": str(base[0].dtype).removeprefix("torch."),
    }
    if hasattr(model, "peft_config"):
        adapter = next(iter(model.peft_config.values())).to_dict()  # the others are references
        facts |= {name: adapter[name] for name in sorted(adapter, key=_r_first) if name not in ADAPTER_HARMLESS}
    facts |= {"number of processes": args.world_size, "device": trainer.accelerator.device.type}
    facts |= {"train_dataset": _rows(trainer.train_dataset), "reward_funcs": trainer.reward_func_names}
    ours = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)} - HARMLESS
    facts |= {name: getattr(args, name) for name in [*OF_TRANSFORMERS, *sorted(ours)]}
    return json.loads(json.dumps(facts, default=_as_json))


def first_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What to say of the first fact that differs between a checkpoint and a run; None where all of them agree.

    Options that did not exist when the checkpoint was made are not compared.
    """
    for name in saved:
        if name == "base_model" or name not in now or saved[name] == now[name]:
            continue  # the same weights may lie elsewhere
        was, now_is = (f"{name}={_apart(*values)}" for values in ((saved[name], now[name]), (now[name], saved[name])))
        if name == "weights":
            was, now_is = (f"base_model={facts['base_model']} (weights {facts['weights']})" for facts in (saved, now))
        return f"Checkpoint was made with {was}; this run has {now_is}. Start without resume, or restore {was}."
    return None


def _apart(value: Any, other: Any) -> str:
    """Of a list, what the other one lacks; never the names of a hundred layers."""
    if isinstance(value, list) and isinstance(other, list):
        value = [entry for entry in value if entry not in other] or value
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _is_adapters(model: nn.Module, name: str) -> bool:
    return any(f".{adapter}." in f"{name}." for adapter in getattr(model, "peft_config", ()))


def _r_first(name: str) -> tuple[bool, str]:
    return name != "r", name


def _some(parameter: Tensor) -> str:
    """Shape and first values: of any two models, some of them differ."""
    first = parameter.detach().flatten()[:SAMPLED_WEIGHTS].cpu().contiguous()
    return f"{tuple(parameter.shape)} {hashlib.sha256(first.view(torch.uint8).numpy().tobytes()).hexdigest()}"


def _rows(dataset: Any) -> str:
    if not isinstance(dataset, Dataset):
        return type(dataset).__name__
    every = max(1, len(dataset) // SAMPLED_ROWS)
    rows = [json.dumps(dataset[i], sort_keys=True, default=_as_json) for i in range(0, len(dataset), every)]
    return f"{len(dataset)} rows ({_digest(*rows)})"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _as_json(value: Any) -> Any:
    """Sets in order; of what JSON has no form for, such as images, the type."""
    return sorted(value) if isinstance(value, set) else type(value).__name__
