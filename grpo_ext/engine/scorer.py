"""Score a micro-batch for a trainer: one request in, its scores out, whichever path computes them.

    scores = scorer(model, ScoringRequest(scoring_pass=ScoringPass.UPDATE, ...), plain)

The engine scores rows that can share prompts. If they cannot, `plain` scores them, which is TRL's own scoring.

Legend: B rows, S prompt tokens, C completion tokens, T = S + C, H hidden size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor, nn

from grpo_ext.engine.autocast import without_adapter_casts
from grpo_ext.engine.batch import NO_GRAD_CHUNK_FACTOR, Scores, ScoringBatch, Siblings, find_siblings
from grpo_ext.engine.out_of_memory import MemoryLimits

Plain = Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]


class ScoringPass(Enum):
    """Whose log-probs to compute: those of the policy that sampled, the reference, or the policy being updated."""

    OLD = "old"
    REFERENCE = "reference"
    UPDATE = "update"


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """What to score, and what to return.

    Attributes:
        scoring_pass: which pass this is.
        input_ids_BT, attention_mask_BT: prompts and completions, padded as in TRL.
        completion_tokens: C.
        temperatures: sampling temperature of each row.
        max_rows: maximum rows per forward; None for whole groups.
        chunk_tokens: maximum tokens that carry a graph at the same time; None for no limit.
        one_row_at_a_time: if `chunk_tokens` is None, limit it to the tokens of the longest row.
        with_entropies, with_aux_loss: return entropies, and the load-balancing loss.
        with_hidden: return the last hidden states (no-grad passes only).
        ref_hidden_BCH: last hidden states of the reference if the exact KL to it is requested, else None.
        idle_rows: rows without a gradient. A prompt whose rows are all idle runs apart from the rest.
        skip_idle: leave out prompts whose rows are all idle, instead of running them.
        loss: see `ScoringBatch`.
    """

    scoring_pass: ScoringPass
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    completion_tokens: int
    temperatures: list[float]
    max_rows: int | None = None
    chunk_tokens: int | None = None
    one_row_at_a_time: bool = False
    with_entropies: bool = False
    with_aux_loss: bool = False
    with_hidden: bool = False
    ref_hidden_BCH: Tensor | None = None
    idle_rows: frozenset[int] = frozenset()
    skip_idle: bool = False
    loss: Callable[[Scores], Tensor] | None = None

    def __getitem__(self, rows: slice) -> "ScoringRequest":
        """The same request for some of the rows. Only for passes without idle rows and without an exact KL."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT[rows],
            attention_mask_BT=self.attention_mask_BT[rows],
            temperatures=self.temperatures[rows],
        )


@dataclass(frozen=True, kw_only=True)
class RequestScores(Scores):
    """`Scores`, and the indices of the rows that were skipped."""

    skipped_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores requests with one model and its reference.

    Attributes:
        shares_prompts: whether `install_shared_scoring` has prepared the models.
        requires_sharing: whether plain scoring would ignore part of the model, such as an adapter on the LM head.
        experts_per_token: top-k of a mixture of experts if the run uses its load-balancing loss, else None.
        autocast: creates the context of each forward.
        limits: limits on tokens that out-of-memory errors have imposed so far.
    """

    shares_prompts: bool
    requires_sharing: bool
    experts_per_token: int | None
    autocast: Callable[[], AbstractContextManager[object]]
    limits: MemoryLimits = field(default_factory=MemoryLimits)

    def __call__(self, model: nn.Module, request: ScoringRequest, plain: Plain) -> RequestScores:
        """The scores of every row, shapes (B, C), 0 on padding.

        Args:
            model: the model as wrapped by the trainer.
            plain: TRL's own scoring of the same rows.

        Raises:
            ValueError: the rows cannot share prompts, and plain scoring would be wrong.
        """
        groups = self._groups(request)
        if groups is None:
            logps_BC, entropies_BC, aux_loss = plain()
            return RequestScores(
                logps_BC=logps_BC, entropies_BC=entropies_BC, kls_BC=None, hidden_BCH=None, aux_loss=aux_loss
            )
        with_graph = torch.is_grad_enabled()
        chunk_tokens = self.limits.apply(_chunk_tokens(request, groups), with_graph=with_graph)
        idle = [group for group in groups if request.idle_rows.issuperset(group.rows)]
        batch = ScoringBatch(
            completion_ids_BC=request.input_ids_BT[:, -request.completion_tokens :],
            groups=[group for group in groups if group not in idle],
            temperatures=request.temperatures,
            separate_groups=[] if request.skip_idle else idle,
            max_rows=request.max_rows,
            chunk_tokens=chunk_tokens,
            experts_per_token=self.experts_per_token if request.with_aux_loss else None,
            with_entropies=request.with_entropies,
            with_hidden=request.with_hidden,
            ref_hidden_BCH=request.ref_hidden_BCH,
            loss=request.loss,
        )
        with self.autocast(), without_adapter_casts(model):
            scores: Scores = model(scoring_batch=batch)
        self.limits.observe(batch.tokens, chunk_tokens, scores.chunk_tokens, with_graph=with_graph)
        skipped = [row for group in idle for row in group.rows] if request.skip_idle else []
        return RequestScores(**vars(scores), skipped_rows=skipped)

    def _groups(self, request: ScoringRequest) -> list[Siblings] | None:
        """The rows with tokens to score, by prompt; None if plain scoring must handle them."""
        if not self.shares_prompts:
            return None
        groups = find_siblings(request.input_ids_BT, request.attention_mask_BT, request.completion_tokens)
        if groups is None:
            if self.requires_sharing:
                raise ValueError("An adapter on the LM head needs a prompt of at least one token in every row.")
            return None
        # The load-balancing loss also counts prompt tokens, so a micro-batch without completion tokens is left to TRL.
        if request.with_aux_loss:
            return groups if any(group.lengths[0] for group in groups) else None
        return [group for group in groups if group.lengths[0]]


def _chunk_tokens(request: ScoringRequest, groups: list[Siblings]) -> int | None:
    chunk_tokens = request.chunk_tokens
    if chunk_tokens is None and request.one_row_at_a_time:
        chunk_tokens = max((group.prompt_tokens + group.lengths[0] for group in groups), default=1)
    if chunk_tokens is not None and not torch.is_grad_enabled():
        chunk_tokens *= NO_GRAD_CHUNK_FACTOR
    return chunk_tokens
