"""Plan the memory of a run, and what fits, from the config of its model alone, before any weights are loaded.

    plan_memory(PolicyConfig("Qwen/Qwen2.5-0.5B-Instruct", load_in_4bit=True), StepShape(prompt=512, ...),
                device_type="cuda", memory=8 * 2**30).fits

Weights, adapter and optimizer states are counted on a model without data (`meta_model.py`). The phases of a step are
measured on models of its first layers (`estimate_step.py`) and extrapolated, since each further layer adds the same
amount. tests/memory/test_plan.py compares plans with measured peaks on a CPU; no plan has been compared with a GPU yet.
"""

import bisect
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo_ext.memory.device_kernels import DeviceKernels
from grpo_ext.memory.estimate_step import PhaseMemory, estimate_phase
from grpo_ext.memory.meta_model import build_meta_model, bytes_by_kind, layer_period, load_config, with_first_layers
from grpo_ext.memory.step_shapes import PhaseShape, StepShape, phase_shapes, refuse_impossible_step
from grpo_ext.model.load import PolicyConfig

# Fraction left free for a display, other processes, and fragmentation of the allocator; chosen, not measured.
RESERVED_FRACTION = 0.1
# Memory that is not in tensors. CUDA: an allowance for context, kernels and workspaces. CPU: PyTorch's libraries.
OVERHEAD_BYTES = {"cuda": 600 * 2**20, "cpu": 16 * 2**20}
ADAM_STATES = 2  # float32 numbers per trained parameter
MAX_GENERATIONS = 256
GROUP_SIZES = (4, 8, 16, 32)  # the usual numbers of completions per prompt, in increasing order
# Sizes to maximise; multiples of these units are tried.
SEARCH_UNITS = {"generations": 1, "prompt": 64, "completion": 64, "chunk_tokens": 128}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a run on one device.

    Attributes:
        weights: bytes of the frozen base, per storage format.
        adapter: bytes of the adapter's parameters, float32.
        phases: peak memory of each phase of a step; "update" includes the gradients of the adapter.
        keeps_gradients: whether gradients of earlier micro-batches are held in addition to those of the current one.
        overhead: memory that is not in tensors.
    """

    weights: Mapping[str, float]
    adapter: float
    phases: dict[str, PhaseMemory]
    keeps_gradients: bool
    overhead: float

    @property
    def trained(self) -> float:
        """The adapter, its gradients and the states of AdamW."""
        return (2 + ADAM_STATES) * self.adapter

    def total_in(self, phase: str) -> float:
        """All bytes at the peak of a phase."""
        gradients = self.adapter if phase == "update" and self.keeps_gradients else 0
        permanent = self.overhead + sum(self.weights.values()) + (1 + ADAM_STATES) * self.adapter
        return permanent + gradients + self.phases[phase].total

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=self.total_in)

    @property
    def total(self) -> float:
        """All bytes at the peak of a step."""
        return self.total_in(self.peak_phase)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs and what the device has.

    Attributes:
        memory: bytes of the device.
        largest: if the run fits, the largest `generations`, `prompt`, `completion` and `chunk_tokens` that fit, each
            with the other sizes unchanged. For `chunk_tokens`, None if no limit is small enough, 0 if none is needed.
        changes: if the run does not fit, flags to change, cheapest first, each with the bytes needed once it and all
            flags before it are applied. If the last entry does not fit, nothing does.
        by_group_size: total bytes for each number of completions per prompt, the planned one and those of `GROUP_SIZES`
            that divide the rollout. Rollout and micro-batch stay the same, so larger groups mean fewer prompts.
    """

    step: StepShape
    footprint: Footprint
    memory: float
    largest: dict[str, int | None]
    changes: list[tuple[str, float]]
    by_group_size: dict[int, float] = field(default_factory=dict)

    @property
    def budget(self) -> float:
        """Bytes of the device that a run may use."""
        return (1 - RESERVED_FRACTION) * self.memory

    @property
    def fits(self) -> bool:
        return self.footprint.total <= self.budget


class Planner:
    """Computes footprints of one policy on one kind of device.

    Args:
        device_type: "cuda" or "cpu".

    Raises:
        SystemExit: the config of the model cannot be loaded.
        ValueError: the policy cannot be planned, see `build_meta_model`.
    """

    def __init__(self, policy: PolicyConfig, device_type: str):
        self.policy, self.device_type = policy, device_type
        self.config = load_config(policy)
        self.dtype = _base_dtype(policy, self.config.dtype, device_type)
        self.kernels = DeviceKernels(device_type, self.dtype if device_type == "cuda" else None)
        sizes = bytes_by_kind(build_meta_model(self.config, policy, self.dtype))
        self._adapter = sizes.pop("adapter")
        self._weights = dict(sizes)
        period, layers = layer_period(self.config), self.config.num_hidden_layers
        self._depths = min(2 * period, layers), min(3 * period, layers)
        self._shallow, self._deeper = (
            build_meta_model(with_first_layers(self.config, depth), policy, self.dtype) for depth in self._depths
        )
        self._phase_memory = functools.cache(self._extrapolate)

    def footprint(self, step: StepShape) -> Footprint:
        """What a step of this shape needs."""
        return Footprint(
            weights=self._weights,
            adapter=self._adapter,
            phases={shape.phase: self._phase_memory(shape) for shape in phase_shapes(step)},
            keeps_gradients=step.accumulation > 1,
            overhead=OVERHEAD_BYTES[self.device_type],
        )

    def _extrapolate(self, shape: PhaseShape) -> PhaseMemory:
        """A phase of the whole model, extrapolated from two models of its first layers."""
        shallow, deeper = self._depths
        phase = estimate_phase(self._shallow, shape, self.kernels)
        if deeper == shallow:
            return phase
        times = (self.config.num_hidden_layers - shallow) / (deeper - shallow)
        return phase.extrapolated(estimate_phase(self._deeper, shape, self.kernels), times)

    def largest(self, step: StepShape, name: str, budget: float) -> int | None:
        """See `Plan.largest`. A multiple of the unit in `SEARCH_UNITS`; None if one unit does not fit."""
        unit = SEARCH_UNITS[name]
        bounds = {
            "generations": MAX_GENERATIONS,
            "prompt": self.config.max_position_embeddings - step.completion,
            "completion": self.config.max_position_embeddings - step.prompt,
            "chunk_tokens": (1 + step.rows) * step.prompt + step.rows * step.completion,
        }

        def bytes_of(n: int) -> float:
            return self.footprint(with_size(step, name, n)).total

        if name != "chunk_tokens":
            return largest_multiple(bytes_of, budget, getattr(step, name), bounds[name], unit)
        unbounded = replace(step, chunk_tokens=None, gradient_checkpointing=False)
        if self.footprint(unbounded).total <= budget:
            return 0
        # Bytes are a step function of the chunk size, so the interpolation in `largest_multiple` would be slow.
        return unit * bisect.bisect_right(range(unit, bounds[name] + 1, unit), budget, key=bytes_of) or None


def plan_memory(
    policy: PolicyConfig, step: StepShape, *, device_type: str, memory: float, with_largest: bool = True
) -> Plan:
    """Plan what this policy and step need, and either the largest sizes that fit or what to change so that it fits.

    Args:
        memory: bytes of the device.
        with_largest: whether to search for the largest sizes and to plan other group sizes, which takes a few seconds.

    Raises:
        SystemExit, ValueError: as in `Planner` and `refuse_impossible_step`.
    """
    planner = Planner(policy, device_type)
    refuse_impossible_step(step, planner.config.max_position_embeddings)
    plan = Plan(step=step, footprint=planner.footprint(step), memory=memory, largest={}, changes=[])
    if with_largest:
        plan = replace(plan, by_group_size=_by_group_size(planner, step))
    if not plan.fits:
        return replace(plan, changes=_suggest_changes(planner, step, plan.budget))
    if not with_largest:
        return plan
    largest = {name: planner.largest(step, name, plan.budget) for name in SEARCH_UNITS}
    return replace(plan, largest={name: _at_least(found, getattr(step, name)) for name, found in largest.items()})


def _by_group_size(planner: Planner, step: StepShape) -> dict[int, float]:
    rollout = step.rows * step.accumulation
    sizes = {size for size in GROUP_SIZES if rollout % size == 0} | {step.generations}
    return {size: planner.footprint(replace(step, generations=size)).total for size in sorted(sizes)}


def _at_least(found: int | None, requested: int | None) -> int | None:
    """The requested size fits, so report it if it lies between two multiples. 0 means that no limit is needed."""
    return found if found == 0 or requested is None else max(found or 0, requested)


def with_size(step: StepShape, name: str, value: int) -> StepShape:
    """The step with one size changed. Changing `generations` keeps the number of prompts per micro-batch."""
    rows = max(1, step.rows * value // step.generations) if name == "generations" else step.rows
    sizes: dict[str, Any] = {name: value, "rows": rows}
    return replace(step, **sizes)


def largest_multiple(bytes_of: Callable[[int], float], budget: float, start: int, bound: int, unit: int) -> int | None:
    """The largest multiple of `unit` up to `bound` within `budget`, with few calls of `bytes_of`, which are slow.

    Args:
        bytes_of: must increase with its argument.
        start: where the search begins.
    """
    top = bound // unit
    known: dict[int, float] = {}

    def fits(n: int) -> bool:
        known[n] = bytes_of(n * unit)
        return known[n] <= budget

    low = 0  # in units, the largest number known to fit; `high` is the smallest known not to fit
    guess = min(max(1, start // unit), top)
    if not top or fits(top):
        return top * unit or None
    high = top
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        if low in known and high in known:
            fraction = (budget - known[low]) / (known[high] - known[low])
            guess = min(max(low + int(fraction * (high - low)), low + 1), high - 1)
        else:
            guess = max(1, high // 2) if low == 0 else min(2 * low, top)
    return low * unit or None


def _suggest_changes(planner: Planner, step: StepShape, budget: float) -> list[tuple[str, float]]:
    """Changes that only cost time come first, then those that cost precision, then those that change the task."""
    changes: list[tuple[str, float]] = []

    def fits_with(change: str) -> bool:
        changes.append((change, planner.footprint(step).total))
        return changes[-1][1] <= budget

    chunk = max(64, min(512, step.prompt // 2))
    if step.graph_tokens is None or step.graph_tokens > chunk:
        step = replace(step, chunk_tokens=chunk)
        if fits_with(f"--chunk_tokens {chunk}"):
            return changes
    if not planner.policy.load_in_4bit:
        policy: Any = planner.policy  # mypy skips the base class that has these fields
        planner = Planner(replace(policy, load_in_4bit=True), planner.device_type)
        if fits_with("--load_in_4bit"):
            return changes
    if step.accumulation * step.rows > step.generations:
        step = replace(step, rows=min(step.rows, step.generations), accumulation=1)
        if fits_with(f"--per_device_train_batch_size {step.rows} --gradient_accumulation_steps 1"):
            return changes
    for name, flag, least in (("generations", "num_generations", 4), ("completion", "max_completion_length", 64)):
        while getattr(step, name) > least:
            step = with_size(step, name, max(least, getattr(step, name) // 2))
            with_rows = f" --per_device_train_batch_size {step.rows}" if name == "generations" else ""
            if fits_with(f"--{flag} {getattr(step, name)}{with_rows}"):
                return changes
    return changes


def _base_dtype(policy: PolicyConfig, config_dtype: torch.dtype | None, device_type: str) -> torch.dtype:
    if policy.dtype == "auto":
        return config_dtype or torch.float32
    return getattr(torch, policy.dtype or ("bfloat16" if device_type == "cuda" else "float32"))
