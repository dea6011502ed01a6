"""How much memory a run needs, and what fits: from the config of a model alone, before anything is loaded.

    plan(PolicyConfig("Qwen/Qwen2.5-0.5B-Instruct", load_in_4bit=True), Step(prompt=512, ...), device_type="cuda",
         memory=8 * 2**30).fits

Weights, adapter and optimizer are counted on a model without data (`skeleton.py`), and so is a step (`dry_step.py`),
on models of the first layers: what each further layer adds is the same. On a CPU the result is compared with
measurements in tests/memory/test_plan.py; on a GPU it was not measured.
"""

import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from grpo_ext.memory.device_kernels import Kernels
from grpo_ext.memory.estimate_step import Phase, rehearse
from grpo_ext.memory.meta_model import bytes_by_kind, config_of, period, skeleton, with_layers
from grpo_ext.memory.search import largest_multiple
from grpo_ext.memory.step_shapes import Pass, Step, passes, refuse_impossible_step
from grpo_ext.model.load import PolicyConfig

# Left free: a display, other processes, and holes between blocks that the allocator cannot use. A choice.
RESERVE = 0.1
# Beside tensors. CUDA: context, loaded kernels and their workspaces, an allowance. CPU: what PyTorch's libraries keep.
OVERHEAD = {"cuda": 600 * 2**20, "cpu": 16 * 2**20}
ADAM_STATES = 2  # float32 numbers a trained parameter
MOST_GENERATIONS = 256
UNIT = {"generations": 1, "prompt": 64, "completion": 64, "chunk_tokens": 128}  # to which the largest is found


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a run on one device.

    Attributes:
        weights: of the frozen base, by how they are stored.
        adapter: its parameters, float32.
        phases: of a step, see `dry_step.Phase`; the gradients of the adapter are among those of "update".
        keeps_gradients: whether gradients of earlier micro-batches are there beside those of the current one.
        overhead: beside tensors.
    """

    weights: Mapping[str, float]
    adapter: float
    phases: dict[str, Phase]
    keeps_gradients: bool
    overhead: float

    @property
    def trained(self) -> float:
        """Of the adapter, its gradients and AdamW's states."""
        return (2 + ADAM_STATES) * self.adapter

    def total_in(self, phase: str) -> float:
        """All that is there at the worst moment of a phase."""
        gradients = self.adapter if phase == "update" and self.keeps_gradients else 0
        stays = self.overhead + sum(self.weights.values()) + (1 + ADAM_STATES) * self.adapter
        return stays + gradients + self.phases[phase].total

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total_in)

    @property
    def total(self) -> float:
        """At the worst moment of a step."""
        return self.total_in(self.worst)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs and what the device has.

    Attributes:
        memory: of the device, bytes.
        largest: where it fits, the largest `generations`, `prompt`, `completion` and `chunk_tokens` that do, each with
            the others as they are; for `chunk_tokens` None where none does, and 0 where no bound is needed.
        changes: where it does not fit, what to change, the cheapest first, and the bytes needed after each, all those
            before it included; the last one fits unless none does.
    """

    step: Step
    footprint: Footprint
    memory: float
    largest: dict[str, int | None]
    changes: list[tuple[str, float]]

    @property
    def room(self) -> float:
        return (1 - RESERVE) * self.memory

    @property
    def fits(self) -> bool:
        return self.footprint.total <= self.room


class Planner:
    """Footprints of one policy on one kind of device.

    Args:
        device_type: "cuda" or "cpu".

    Raises:
        SystemExit: the config of the model cannot be had.
        ValueError: the policy is not LoRA on a base that is whole or in 4 bits.
    """

    def __init__(self, policy: PolicyConfig, device_type: str):
        self.policy, self.device_type = policy, device_type
        self.config = config_of(policy)
        self.dtype = _dtype(policy, self.config.dtype, device_type)
        self.kernels = Kernels(device_type, self.dtype if device_type == "cuda" else None)
        sizes = bytes_by_kind(skeleton(self.config, policy, self.dtype))
        self._adapter = sizes.pop("adapter")
        self._weights = dict(sizes)
        every = period(self.config)
        self._layers = min(2 * every, self.config.num_hidden_layers), min(3 * every, self.config.num_hidden_layers)
        self._short, self._longer = (
            skeleton(with_layers(self.config, layers), policy, self.dtype) for layers in self._layers
        )
        self._phase = functools.cache(self._stretched)

    def footprint(self, step: Step) -> Footprint:
        """What a step needs."""
        return Footprint(
            weights=self._weights,
            adapter=self._adapter,
            phases={passed.phase: self._phase(passed) for passed in passes(step)},
            keeps_gradients=step.accumulation > 1,
            overhead=OVERHEAD[self.device_type],
        )

    def _stretched(self, passed: Pass) -> Phase:
        """A phase of the whole model, from that of its first layers."""
        short, longer = self._layers
        phase = rehearse(self._short, passed, self.kernels)
        if longer == short:
            return phase
        times = (self.config.num_hidden_layers - short) / (longer - short)
        return phase.stretched(rehearse(self._longer, passed, self.kernels), times)

    def largest(self, step: Step, name: str, room: float) -> int | None:
        """See `Plan.largest`; in multiples of `UNIT`, and None where not even one fits."""
        bounds = {
            "generations": MOST_GENERATIONS,
            "prompt": self.config.max_position_embeddings - step.completion,
            "completion": self.config.max_position_embeddings - step.prompt,
            "chunk_tokens": (1 + step.rows) * step.prompt + step.rows * step.completion,
        }
        without_bound = replace(step, chunk_tokens=None, gradient_checkpointing=False)
        if name == "chunk_tokens" and self.footprint(without_bound).total <= room:
            return 0

        def bytes_of(n: int) -> float:
            return self.footprint(changed(step, name, n)).total

        if name == "chunk_tokens":  # bytes grow in steps
            sizes = range(UNIT[name], bounds[name] + 1, UNIT[name])
            return UNIT[name] * bisect.bisect_right(sizes, room, key=bytes_of) or None
        return largest_multiple(bytes_of, room, getattr(step, name), bounds[name], UNIT[name])


def plan(policy: PolicyConfig, step: Step, *, device_type: str, memory: float, with_largest: bool = True) -> Plan:
    """What this policy and step need on such a device, what would fit, and where they do not fit, what to change.

    Args:
        memory: bytes of the device.
        with_largest: whether to look for what would fit, which takes some seconds.

    Raises:
        SystemExit, ValueError: as `Planner`.
    """
    planner = Planner(policy, device_type)
    refuse_impossible_step(step, planner.config.max_position_embeddings)
    made = Plan(step=step, footprint=planner.footprint(step), memory=memory, largest={}, changes=[])
    if not made.fits:
        return replace(made, changes=_changes(planner, step, made.room))
    if not with_largest:
        return made
    largest = {name: planner.largest(step, name, made.room) for name in UNIT}
    return replace(made, largest={name: _no_less(found, getattr(step, name)) for name, found in largest.items()})


def _no_less(found: int | None, asked: int | None) -> int | None:
    """What was asked for fits, too, where it is between two multiples; 0 stands for no bound."""
    return found if found == 0 or asked is None else max(found or 0, asked)


def changed(step: Step, name: str, value: int) -> Step:
    """The step with another size; with other generations, micro-batches of as many prompts."""
    rows = max(1, step.rows * value // step.generations) if name == "generations" else step.rows
    sizes: dict[str, Any] = {name: value, "rows": rows}
    return replace(step, **sizes)


def _changes(planner: Planner, step: Step, room: float) -> list[tuple[str, float]]:
    """First what costs time only, then what costs precision, then what changes the task."""
    changes: list[tuple[str, float]] = []

    def fits_with(change: str) -> bool:
        changes.append((change, planner.footprint(step).total))
        return changes[-1][1] <= room

    chunk = max(64, min(512, step.prompt // 2))
    if step.graph_tokens is None or step.graph_tokens > chunk:
        step = replace(step, chunk_tokens=chunk)
        if fits_with(f"--chunk_tokens {chunk}"):
            return changes
    if not planner.policy.load_in_4bit:
        policy: Any = planner.policy  # fields of a skipped base class
        planner = Planner(replace(policy, load_in_4bit=True), planner.device_type)
        if fits_with("--load_in_4bit"):
            return changes
    if step.accumulation * step.rows > step.generations:
        step = replace(step, rows=min(step.rows, step.generations), accumulation=1)
        if fits_with(f"--per_device_train_batch_size {step.rows} --gradient_accumulation_steps 1"):
            return changes
    for name, flag, least in (("generations", "num_generations", 4), ("completion", "max_completion_length", 64)):
        while getattr(step, name) > least:
            step = changed(step, name, max(least, getattr(step, name) // 2))
            if fits_with(f"--{flag} {getattr(step, name)}"):
                return changes
    return changes


def _dtype(policy: PolicyConfig, of_config: torch.dtype | None, device_type: str) -> torch.dtype:
    if policy.dtype == "auto":
        return of_config or torch.float32
    return getattr(torch, policy.dtype or ("bfloat16" if device_type == "cuda" else "float32"))
