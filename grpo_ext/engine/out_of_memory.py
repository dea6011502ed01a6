"""Scoring that does not fit into memory is repeated in smaller chunks.

In: a `ScoringBatch`. Out: its `Scores`, with the limit on tokens that they were computed with. Nothing of a failed
attempt is left: scores and gradients are those of a batch that had the smaller limit from the start.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from grpo_ext.engine.batch import NO_GRAD_CHUNK_FACTOR, Scores, ScoringBatch

logger = logging.getLogger(__name__)

# Chunks of this many tokens are not halved any more: weights and prompt states take most of the memory then.
MIN_CHUNK_TOKENS = 64


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    is_known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_known or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


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


class MemoryLimits:
    """The limits on tokens of scoring passes that memory imposes: chosen before the first step, or after an
    out-of-memory error. Passes with gradients and those without have limits of their own; None if none is known.

    Attributes:
        is_chosen: whether `choose` was called.
    """

    def __init__(self) -> None:
        self.is_chosen = False
        self._limits: dict[str, int | None] = {"with_graph": None, "without_graph": None}

    def choose(self, chunk_tokens: int) -> None:
        """Set the limit of passes with gradients. That of the others follows from it."""
        self.is_chosen = True
        self._limits = {"with_graph": chunk_tokens, "without_graph": NO_GRAD_CHUNK_FACTOR * chunk_tokens}

    def apply(self, chunk_tokens: int | None, *, with_graph: bool) -> int | None:
        """The smaller one of the requested limit and the imposed one; None for no limit."""
        limits = [limit for limit in (chunk_tokens, self._limits[_name(with_graph)]) if limit is not None]
        return min(limits, default=None)

    def observe(self, requested: int | None, used: int | None, *, with_graph: bool) -> None:
        """Remember the limit of a pass if it was smaller than the requested one."""
        if used == requested:
            return
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
