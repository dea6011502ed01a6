"""Scoring, and the backward of a loss, that does not fit into memory is repeated in smaller chunks.

In: a `ScoringBatch`. Out: its `Scores`, with the limit on tokens that they were computed with. Nothing of a failed
attempt is left: scores and gradients are those of a batch that had the smaller limit from the start.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from grpo_ext.engine.batch import NO_GRAD_CHUNK_FACTOR, Scores, ScoringBatch

logger = logging.getLogger(__name__)

# Chunks of this many tokens are not halved further: weights and prompt states take most of the memory then.
MIN_CHUNK_TOKENS = 64
# Failed allocations that neither torch's own type nor accelerate's list of messages covers.
MESSAGES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    is_known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_known or not isinstance(error, RuntimeError):
        return is_known
    return should_reduce_batch_size(error) or any(message in str(error) for message in MESSAGES)


def score_within_memory(score: Callable[[ScoringBatch], Scores], batch: ScoringBatch) -> Scores:
    """Score the batch; after an out-of-memory error, again with half the limit on tokens, down to one row and then to
    segments of its prompt.

    Raises:
        RuntimeError, MemoryError: the smallest chunks do not fit either.
    """
    while True:
        try:
            return replace(score(batch), chunk_tokens=batch.chunk_tokens)
        except (RuntimeError, MemoryError) as error:
            limit = batch.tokens if batch.chunk_tokens is None else min(batch.tokens, batch.chunk_tokens)
            if not is_out_of_memory(error) or limit <= MIN_CHUNK_TOKENS:
                raise
        # Outside the handler, whose traceback would keep the tensors of the failed attempt.
        batch = replace(batch, chunk_tokens=max(MIN_CHUNK_TOKENS, limit // 2))
        clear_device_cache(garbage_collection=True)


def loss_within_memory(
    loss_of: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    limits: "MemoryLimits",
    snapshot: Callable[[], Callable[[], None]],
    scale: float | Tensor,
) -> Tensor:
    """A loss whose gradients are already computed; after an out-of-memory error in its backward, computed again with
    half the limit on tokens. For losses that scoring cannot differentiate by itself.

    Args:
        loss_of: computes the loss; its scoring obeys `limits`.
        snapshot: called before the loss; returns a function that undoes what `loss_of` has changed.
        scale: factor that keeps small gradients from becoming 0 in fp16.

    Raises:
        RuntimeError, MemoryError: the smallest chunks do not fit either.
    """
    while True:
        undo = snapshot()
        try:
            loss = loss_of()
            grads = torch.autograd.grad(scale * loss, parameters, allow_unused=True)
            return _Differentiated.apply(loss.detach(), grads, scale, *parameters)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not limits.can_halve():
                raise
        undo()
        limits.halve()
        clear_device_cache(garbage_collection=True)


class _Differentiated(torch.autograd.Function):
    """A loss that hands out gradients which were computed before, so that hooks on the parameters fire once."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, grads: Sequence[Tensor | None], scale: float | Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.grads, ctx.scale = grads, scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        factor = output_grads[0] / ctx.scale
        return None, None, None, *(None if grad is None else grad * factor for grad in grads)


class MemoryLimits:
    """The limits on tokens of scoring passes that memory imposes: chosen before the first step, or after an
    out-of-memory error. Passes with gradients and those without have limits of their own; None if none is known.

    Attributes:
        is_chosen: whether `choose` was called.
    """

    def __init__(self) -> None:
        self.is_chosen = False
        self._limits: dict[str, int | None] = {"with_graph": None, "without_graph": None}
        self._graph_tokens = 0  # the most that the last pass with gradients had on a graph

    def choose(self, chunk_tokens: int) -> None:
        """Set the limit of passes with gradients. That of the others follows from it."""
        self.is_chosen = True
        self._limits = {"with_graph": chunk_tokens, "without_graph": NO_GRAD_CHUNK_FACTOR * chunk_tokens}

    def apply(self, chunk_tokens: int | None, *, with_graph: bool) -> int | None:
        """The smaller one of the requested limit and the imposed one; None for no limit."""
        limits = [limit for limit in (chunk_tokens, self._limits[_name(with_graph)]) if limit is not None]
        return min(limits, default=None)

    def observe(self, tokens: int, requested: int | None, used: int | None, *, with_graph: bool) -> None:
        """Remember the limit of a pass over this many tokens if it was smaller than the requested one."""
        if with_graph:
            self._graph_tokens = tokens if used is None else min(tokens, used)
        if used != requested:
            self._impose(used, with_graph=with_graph)

    def can_halve(self) -> bool:
        """Whether the chunks of the last pass with gradients can be made smaller."""
        return self._graph_tokens > MIN_CHUNK_TOKENS

    def halve(self) -> None:
        """Impose half the size of the last pass with gradients, whose backward did not fit."""
        self._graph_tokens = max(MIN_CHUNK_TOKENS, self._graph_tokens // 2)
        self._impose(self._graph_tokens, with_graph=True)

    def _impose(self, used: int | None, *, with_graph: bool) -> None:
        self._limits[_name(with_graph)] = used
        logger.warning(
            "Out of memory: %s now run in chunks of at most %s tokens, with the same result. To begin with this size, "
            "set chunk_tokens=%s.",
            "updates" if with_graph else "passes without gradients",
            used,
            used,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"is_chosen": self.is_chosen, **self._limits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.is_chosen = state["is_chosen"]
        self._limits = {name: state[name] for name in self._limits}


def _name(with_graph: bool) -> str:
    return "with_graph" if with_graph else "without_graph"
