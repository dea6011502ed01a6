"""The meters of the benchmarks: what belongs to a step, and the memory of this process."""

import sys

import pytest
import torch

from tests.benchmarks.meters import PHASES, KernelPeak, SampledPeak, StepMeter, peak_meter
from tests.tools.models import random_lora
from tests.tools.waiting import becomes

MIB = 2**20


def test_only_optimizer_steps_are_measured(build, small_model):
    """The worst-case step samples and scores before the first step. Its time must not count as a step, nor end a
    benchmark."""
    fresh = random_lora(init_lora_weights=True)  # the checks stop a run whose adapter differs from its reference
    trainer = build(small_model, guards=True, peft_config=fresh, beta=0.1, max_steps=2)
    meter = StepMeter(peak_meter(), count_flops=True)
    meter.watch(trainer)
    trainer.train()
    assert [set(step) for step in meter.seconds] == [set(step) for step in meter.highest] == [set(PHASES)] * 2
    assert all(seconds > 0 for step in meter.seconds for seconds in step.values())
    assert meter.update_flops > 0


def test_a_measured_step_runs_as_many_tokens(build, small_model):
    """A meter that replaced methods of the update would make the trainer run each chunk twice."""
    tokens = []
    for is_measured in (False, True):
        trainer = build(small_model, guards=False, peft_config=random_lora(), chunk_tokens=40, max_steps=1)
        lm = trainer.model.get_base_model().base_model
        counts = []
        hook = lm.register_forward_pre_hook(
            lambda module, args, kwargs, counts=counts: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        if is_measured:
            StepMeter(peak_meter(), count_flops=False).watch(trainer)
        trainer.train()
        hook.remove()
        small_model = trainer.model.unload()
        tokens.append(sum(counts))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("meter", [KernelPeak, SampledPeak])
def test_the_peak_includes_memory_that_was_freed_again(meter):
    if meter is KernelPeak and sys.platform != "linux":
        pytest.skip("the high-water mark is kept by Linux")
    peak = meter()
    peak.reset()
    before = peak.now()

    def is_seen():
        torch.ones(256 * MIB, dtype=torch.uint8)
        return peak.highest() - before > 200 * MIB

    assert becomes(is_seen)  # a poll may miss the first ones
    peak.reset()
    assert peak.highest() - before < 200 * MIB
