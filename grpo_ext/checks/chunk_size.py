"""`chunk_tokens="auto"`: chunks of an update as large as memory allows, measured in the worst-case step.

Updates on one and on two rows of the largest shape show how much memory a prompt with its first row needs, and each
further row:

    peak of n rows = peak of one row + (n - 1) (peak of two rows - peak of one row)

The chosen chunk leaves a tenth of the free memory. On a CPU, whose memory is shared with other programs, it leaves half
of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grpo_ext.machine import GIB, free_memory_per_process
from grpo_ext.memory.counter import MemoryCounter

USABLE_ON_CPU, USABLE_ON_GPU = 0.5, 0.9  # of the free memory


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The update of the worst-case step: tokens of a row with its prompt, rows per group, and prompts."""

    row_tokens: int
    rows_per_prompt: int
    prompts: int

    @property
    def rows(self) -> int:
        return self.rows_per_prompt * self.prompts


@dataclass(frozen=True, kw_only=True)
class ChunkSize:
    """The chosen limit on tokens, None if a micro-batch is run whole, and why, in one line."""

    tokens: int | None
    reason: str


def choose_chunk_size(shape: Shape, update: Callable[[int], Any], device: torch.device) -> ChunkSize:
    """Measure updates on one and on two rows, and choose.

    Args:
        update: loss and gradients of this many rows of one prompt, in a single chunk.
    """
    free = _free_memory(device)
    budget = (USABLE_ON_CPU if device.type == "cpu" else USABLE_ON_GPU) * free
    first = _peak_of(lambda: update(1), device)
    further = max(1, _peak_of(lambda: update(2), device) - first) if shape.rows_per_prompt > 1 else first
    measured = (
        f"{first / GIB:.2f} GB for a prompt with one completion, {further / GIB:.2f} GB for each further one, "
        f"{free / GIB:.2f} GB free"
    )
    whole = shape.prompts * (first + (shape.rows_per_prompt - 1) * further)
    if whole <= budget:
        return ChunkSize(tokens=None, reason=f"{shape.rows} completions at once: {measured}")
    rows = min(shape.rows_per_prompt, max(1, 1 + int((budget - first) // further)))
    tokens = rows * shape.row_tokens
    return ChunkSize(tokens=tokens, reason=f"chunks of {rows} completions ({tokens} tokens): {measured}")


def _free_memory(device: torch.device) -> float:
    if device.type != "cuda":
        return free_memory_per_process()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """The largest number of bytes that a call holds at the same time."""
    if device.type == "cpu":
        with MemoryCounter() as counter:
            run()
        return counter.peak
    module = torch.get_device_module(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    run()
    return module.max_memory_allocated(device) - before
