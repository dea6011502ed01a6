"""Whole optimizer steps on a second device, which a CPU simulates: no operation that mixes devices, and ceilings on
host syncs and kernel launches per step.

An exceeded ceiling means that a step got slower on a GPU, although no result changed: a sync too many stops the host
until the device has finished, and a small model waits for its launches. If a number falls, lower its ceiling.
`pytest -rP` prints all counts by line.
"""

from typing import Any, NamedTuple

import pytest
import torch

from grpo_ext import TRL_DEFAULTS
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.second_device import SecondDevice
from tests.tools.training import adapter_of

STEPS = 2


class Ceiling(NamedTuple):
    """Host syncs and kernel launches per optimizer step, of 8 rows with 12 new tokens each."""

    syncs: int
    launches: int


# Settings, and their ceilings.
RUNS: dict[str, tuple[dict[str, Any], Ceiling]] = {
    "default": ({}, Ceiling(118, 6_500)),
    "chunks": ({"chunk_tokens": 40}, Ceiling(128, 10_800)),
    "one row at a time": ({"gradient_checkpointing": True}, Ceiling(128, 10_800)),
    "exact KL": ({"kl_estimator": "exact"}, Ceiling(123, 6_700)),
    "replay": ({"replay_fraction": 0.5}, Ceiling(124, 6_500)),
    "extended groups": ({"num_generations_max": 8}, Ceiling(121, 6_500)),
    "resampled groups": ({"dead_groups": "resample"}, Ceiling(119, 6_500)),
    "temperature": (
        {"temperature_schedule": "entropy", "temperature_entropy_target": 1.0},
        Ceiling(119, 6_500),
    ),
    "two updates per rollout": ({"num_iterations": 2}, Ceiling(81, 5_100)),
    "reference that follows": ({"sync_ref_model": True, "ref_model_sync_steps": 1}, Ceiling(132, 6_700)),
    "LoRA on the LM head": ({"peft_config": random_lora(target_modules=["q_proj", "lm_head"])}, Ceiling(118, 5_200)),
    "two micro-batches": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        Ceiling(133, 6_700),
    ),
    "TRL's objective": (TRL_DEFAULTS, Ceiling(121, 5_800)),
}
QUICK = ("default", "chunks", "two micro-batches")
ALSO_IN_CHUNKS = ("one row at a time",)


@pytest.fixture
def device():
    with SecondDevice() as device:
        yield device


@pytest.fixture
def build_there(build, tokenizer):
    """As `build`, on the second device, with a new model, in bf16 unless something else is requested."""

    def make(model: str | None = None, **changes: Any) -> Any:
        settings = {"peft_config": random_lora(), "use_cpu": False, "bf16": True, "max_steps": STEPS} | changes
        trainer = build(model or small_llama(tokenizer), **settings)
        assert trainer.accelerator.device == SecondDevice.torch_device
        return trainer

    return make


def count_steps(device: SecondDevice, trainer: Any) -> Ceiling:
    """Train; what was counted per optimizer step, rounded up."""
    with device.counting() as counts:
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert not counts.mixed
    print(counts.report())
    return Ceiling(-(-counts.syncs.total() // STEPS), -(-counts.launches.total() // STEPS))


@pytest.mark.parametrize("name", slow_but(thinned(RUNS, ALSO_IN_CHUNKS), QUICK))
def test_steps(device, build_there, name):
    settings, ceiling = RUNS[name]
    counted = count_steps(device, build_there(**settings))
    assert counted.syncs <= ceiling.syncs, counted
    assert counted.launches <= ceiling.launches, counted


def in_fp16(trainer: Any) -> Any:
    """The trainer with autocast to float16 and a gradient scaler, which accelerate gives to devices that it knows."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=8.0)
    accelerator.native_amp, accelerator.state._mixed_precision, trainer.args.fp16 = True, "fp16", True
    return trainer


def test_fp16(device, build_there):
    """Guards against reading the scale of the gradients in every micro-batch, for which the host would wait."""
    counts = []
    for rows, micro_batches in ((8, 1), (4, 2), (4, 4)):
        trainer = build_there(
            bf16=False, per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches, num_generations=4
        )
        counts.append(count_steps(device, in_fp16(trainer)).syncs)
        assert all(value.dtype == torch.float32 for value in adapter_of(trainer).values())
    ceilings = RUNS["default"][1].syncs, RUNS["two micro-batches"][1].syncs, 173
    assert all(syncs <= ceiling for syncs, ceiling in zip(counts, ceilings, strict=True)), counts


def test_syncs_do_not_grow_with_the_tokens(device, build_there):
    """The sampler looks after every eighth token which rows have ended. One sync per token would exceed the bound."""

    def syncs(tokens):
        # No row ends early.
        trainer = build_there(max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens})
        return count_steps(device, trainer).syncs

    assert syncs(28) - syncs(12) <= 4


def test_the_adapter_is_that_of_the_cpu(device, build, build_there, tokenizer):
    """In float32, up to rounding."""
    settings = {"bf16": False, "optim": "sgd", "learning_rate": 0.1}
    there = build_there(**settings)
    there.train()
    here = build(small_llama(tokenizer), peft_config=random_lora(), **settings)
    here.train()
    assert here.accelerator.device.type == "cpu"
    for name, value in adapter_of(here).items():
        torch.testing.assert_close(adapter_of(there)[name].cpu(), value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_saved_run_resumes(device, build_there):
    """The resumed run ends with the adapter of the uninterrupted one."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole = build_there(**settings)
    whole.train()
    resumed = build_there(**settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert not device.counts.mixed
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], value), name


def test_a_device_without_float64(build_there):
    """As on Apple's GPUs: rewards, advantages and the checks of the first steps."""
    with SecondDevice(has_float64=False) as device:
        with pytest.raises(TypeError, match="does not support float64"):
            torch.ones(1, device=device.torch_device).double()
        trainer = build_there(
            peft_config=random_lora(init_lora_weights=True),
            guards=True,
            num_generations_max=8,
            replay_fraction=0.5,
        )
        trainer.train()
    assert trainer.state.global_step == STEPS
