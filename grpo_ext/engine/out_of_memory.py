"""Scoring that does not fit into memory is repeated in smaller chunks.

In: a `ScoringBatch`. Out: its `Scores`, with the limit on tokens that they were computed with. Nothing of a failed
attempt is left: scores and gradients are those of a batch that had the smaller limit from the start.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from grpo_ext.engine.batch import Scores, ScoringBatch

logger = logging.getLogger(__name__)

# Chunks of this many tokens are not halved any more: weights and prompt states take most of the memory then.
MIN_CHUNK_TOKENS = 64


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


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
    """The limits on tokens that out-of-memory errors have imposed on later scoring passes.

    Each pass with gradients, and each without, has its own limit; None if none is known.
    """

    def __init__(self) -> None:
        self._limits: dict[str, int | None] = {"with_graph": None, "without_graph": None}

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
        return dict(self._limits)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._limits = dict(state)


def _name(with_graph: bool) -> str:
    return "with_graph" if with_graph else "without_graph"
