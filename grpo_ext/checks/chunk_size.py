"""`chunk_tokens="auto"`: chunks of an update as large as memory allows, measured.

Updates on one and on two rows show how much memory a prompt with its first row needs, and each further row:

    peak of a group of n rows = peak of one row + (n - 1) (peak of two rows - peak of one row)

The chosen chunk leaves a tenth of the free memory. On a CPU, whose memory is shared with other programs, it leaves half
of it. The worst-case step measures rows of the largest shape. In a run without that step, the first micro-batch is
measured, and the size follows from the memory per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from grpo_ext.checks.trial import rows_of, update
from grpo_ext.machine import GIB, free_memory_per_process
from grpo_ext.memory.counter import MemoryCounter

if TYPE_CHECKING:
    from grpo_ext.trainer import GRPOExtTrainer

USABLE_ON_CPU, USABLE_ON_GPU = 0.5, 0.9  # of the free memory


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A micro-batch: tokens of a prompt, tokens of a completion, completions per prompt, and prompts."""

    prompt: int
    completion: int
    rows_per_prompt: int
    prompts: int

    @property
    def rows(self) -> int:
        return self.rows_per_prompt * self.prompts

    @property
    def row_tokens(self) -> int:
        return self.prompt + self.completion

    @property
    def group_tokens(self) -> int:
        """Tokens of a prompt with all of its completions on one graph, counted as in `ScoringBatch.tokens`."""
        return self.prompt + self.rows_per_prompt * self.row_tokens


@dataclass(frozen=True, kw_only=True)
class ChunkSize:
    """The chosen limit on tokens, and why, in one line."""

    tokens: int
    reason: str


def choose_chunk_size(shape: Shape, peak_of: Callable[[int], int], free: float, usable: float) -> ChunkSize:
    """Choose from the peaks of updates on one and on two rows.

    Args:
        peak_of: peak memory in bytes of an update on this many rows of one prompt, in a single chunk.
        free: free memory in bytes.
        usable: fraction of it that an update may use.
    """
    budget = usable * free
    first = peak_of(1)
    further = max(1, peak_of(2) - first) if shape.rows_per_prompt > 1 else first
    measured = (
        f"{first / GIB:.2f} GB for a prompt with one completion, {further / GIB:.2f} GB for each further one, "
        f"{free / GIB:.2f} GB free"
    )
    groups = int(budget // (first + (shape.rows_per_prompt - 1) * further))
    if groups >= shape.prompts:
        return ChunkSize(tokens=groups * shape.group_tokens, reason=f"{shape.rows} completions at once: {measured}")
    if groups > 0:
        rows, tokens = groups * shape.rows_per_prompt, groups * shape.group_tokens
    else:
        rows = min(shape.rows_per_prompt, max(1, 1 + int((budget - first) // further)))
        tokens = rows * shape.row_tokens
    return ChunkSize(tokens=tokens, reason=f"chunks of {rows} completions ({tokens} tokens): {measured}")


def choose_on(trainer: "GRPOExtTrainer", inputs: dict[str, Any]) -> ChunkSize:
    """Choose by updates on the row of a micro-batch that has the longest prompt. All processes choose the size of the
    one with the least memory.

    Call it in `trial.without_a_trace`: it replaces the limits of the trainer.

    Args:
        inputs: TRL's tensors; completions are measured as if all were as long as the longest one.
    """
    accelerator, limits = trainer.accelerator, trainer.parts.scorer.limits
    size, completion = inputs["completion_ids"].shape
    prompts_B = inputs["prompt_mask"].sum(dim=1)
    longest = int(prompts_B.argmax())
    shape = Shape(
        prompt=int(prompts_B[longest]),
        completion=completion,
        rows_per_prompt=min(size, trainer.num_generations),
        prompts=max(1, -(-size // trainer.num_generations)),
    )

    def run(count: int) -> None:
        limits.choose(count * shape.row_tokens)
        rows = rows_of(inputs, [longest] * count)
        # Rows without an advantage are skipped, and so are masked completions.
        used = {name: torch.ones_like(rows[name]) for name in ("advantages", "completion_mask")}
        update(trainer, rows | used)

    device = accelerator.device
    usable = USABLE_ON_CPU if device.type == "cpu" else USABLE_ON_GPU
    chosen = choose_chunk_size(shape, lambda count: peak_of(lambda: run(count), device), free_memory(device), usable)
    least = int(accelerator.gather(torch.tensor([chosen.tokens], device=device)).min())
    if least == chosen.tokens:
        return chosen
    return ChunkSize(
        tokens=least, reason=f"chunks of {least} tokens, the size for the process with the least free memory"
    )


def free_memory(device: torch.device) -> float:
    """Free memory of a device in bytes, including what PyTorch has reserved and does not use."""
    if device.type != "cuda":
        return free_memory_per_process()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """The largest number of bytes that a call holds at the same time."""
    module = torch.get_device_module(device)
    if not hasattr(module, "reset_peak_memory_stats"):  # a CPU, or an Apple GPU
        with MemoryCounter() as counter:
            run()
        return counter.peak
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    run()
    return module.max_memory_allocated(device) - before
