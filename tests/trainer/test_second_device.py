"""Whole optimizer steps on a second device, which a CPU simulates: no operation that mixes devices, and ceilings on
host syncs and kernel launches per step.

An exceeded ceiling means that a step got slower on a GPU, although no result changed: a sync too many stops the host
until the device has finished, and a small model waits for its launches. If a number falls, lower its ceiling.
`pytest -rP` prints all counts by line.
"""

from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo_ext import TRL_DEFAULTS
from tests.tools.lanes import slow_but
from tests.tools.models import NF4, random_lora
from tests.tools.second_device import SecondDevice
from tests.tools.training import adapter_of

STEPS = 2


class Ceiling(NamedTuple):
    """Host syncs and kernel launches per optimizer step, of 8 rows with 12 new tokens each."""

    syncs: int
    launches: int


# Settings, and their ceilings.
RUNS: dict[str, tuple[dict[str, Any], Ceiling]] = {
    "default": ({}, Ceiling(0, 0)),
    "chunks": ({"chunk_tokens": 40}, Ceiling(0, 0)),
    "one row at a time": ({"gradient_checkpointing": True}, Ceiling(0, 0)),
    "exact KL": ({"kl_estimator": "exact"}, Ceiling(0, 0)),
    "replay": ({"replay_fraction": 0.25}, Ceiling(0, 0)),
    "extended groups": ({"num_generations_max": 8}, Ceiling(0, 0)),
    "resampled groups": ({"dead_groups": "resample"}, Ceiling(0, 0)),
    "temperature": (
        {"temperature_schedule": "entropy", "temperature_entropy_target": 1.0},
        Ceiling(0, 0),
    ),
    "two updates per rollout": ({"num_iterations": 2}, Ceiling(0, 0)),
    "reference that follows": ({"sync_ref_model": True, "ref_model_sync_steps": 1}, Ceiling(0, 0)),
    "LoRA on the LM head": ({"peft_config": random_lora(target_modules=["q_proj", "lm_head"])}, Ceiling(0, 0)),
    "two micro-batches": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        Ceiling(0, 0),
    ),
    "TRL's objective": (TRL_DEFAULTS, Ceiling(0, 0)),
}
