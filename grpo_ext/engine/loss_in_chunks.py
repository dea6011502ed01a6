"""The loss of a micro-batch and its gradient in one pass over chunks of completions, in the memory of one chunk.

For losses whose gradient in a row does not depend on the scores of other rows. Each chunk is scored with a graph, the
gradient of the loss in its scores is computed, and the graph is run backward at once:

    prompt --> leaves --fork--> chunk 1 --> scores --> loss --backward--> gradients of the leaves --> prompt
                      --fork--> chunk 2 --> scores --> loss --backward-->

No forward is repeated, except that of a prompt that is longer than a chunk. `score_chunked.py` serves all other losses,
and runs every chunk twice.

Legend: B rows, C completion tokens, n rows of a chunk, c tokens of its longest completion.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.batch import (
    ChunkScores,
    Scores,
    ScoringBatch,
    Siblings,
    assemble_scores,
    prompt_ids,
)
from grpo_ext.engine.chunk_gradients import Gradients, LeafStates, backward_prompt
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.moe_aux_loss import RouterRecorder
from grpo_ext.engine.prefill import (
    cache_states,
    prefill,
    prefill_in_segments,
    share_prefix_storage,
)
from grpo_ext.engine.score import ChunkScorer


def loss_in_chunks(
    lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead, context: Callable[[], AbstractContextManager[Any]]
) -> Scores:
    """Scores without gradients, and `loss_gradient`, a 0 that has the gradient of `batch.loss`.

    Args:
        context: see `score_in_chunks`.
    """
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    logps_BC, entropies_BC, kls_BC, loss_gradient = _LossInChunks.apply(lm, batch, head, context, *parameters)
    return Scores(
        logps_BC=logps_BC,
        entropies_BC=entropies_BC,
        kls_BC=kls_BC,
        hidden_BCH=None,
        aux_loss=None,
        loss_gradient=loss_gradient,
    )


class _LossInChunks(torch.autograd.Function):
    """Takes the trainable parameters as inputs and returns their gradients, so that hooks on them (DDP) fire once."""

    @staticmethod
    def forward(
        ctx: Any,
        lm: PreTrainedModel,
        batch: ScoringBatch,
        head: TiledHead,
        context: Callable,
        *parameters: nn.Parameter,
    ) -> Any:
        gradients = Gradients(parameters)
        losses = _ChunkLosses(batch)
        chunks: list[ChunkScores] = []
        with torch.enable_grad(), context(), RouterRecorder(lm, None) as router:
            scorer = ChunkScorer(lm=lm, batch=batch, head=head, router=router)
            for siblings in batch.all_groups:
                chunks += _run_group(scorer, siblings, losses, gradients)
        scores = assemble_scores(batch, chunks, None)
        ctx.gradients = gradients.sums
        outputs = scores.logps_BC, scores.entropies_BC, scores.kls_BC
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return *outputs, scores.logps_BC.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        scaled, ctx.gradients = [None if grad is None else grad.mul_(output_grads[3]) for grad in ctx.gradients], None
        return None, None, None, None, *scaled


class _ChunkLosses:
    """The gradients of `batch.loss` in the scores of one chunk at a time.

    The loss is given the scores of all rows, so that it finds the sizes and the normaliser of the whole micro-batch.
    Scores of other chunks have no gradient; those of later chunks are 0.
    """

    def __init__(self, batch: ScoringBatch):
        assert batch.loss is not None
        self._loss = batch.loss
        shape, device = batch.completion_ids_BC.shape, batch.completion_ids_BC.device
        has_scores = True, batch.with_entropies, batch.ref_hidden_BCH is not None
        self._scores = [torch.zeros(shape, device=device) if has else None for has in has_scores]

    def gradients(self, chunk: ChunkScores) -> list[Tensor | None]:
        """One gradient per score of `chunk.differentiable`, None if the loss does not depend on it."""
        leaves: list[Tensor] = []
        filled: list[Tensor | None] = []
        for scores_BC, scores_nc in zip(self._scores, chunk.differentiable, strict=True):
            if scores_BC is None or scores_nc is None:
                filled.append(None)
                continue
            leaf_nc = scores_nc.detach().requires_grad_()
            scores_BC[chunk.rows, : leaf_nc.size(1)] = leaf_nc.detach()
            with_leaf_BC = scores_BC.clone()
            with_leaf_BC[chunk.rows, : leaf_nc.size(1)] = leaf_nc
            leaves.append(leaf_nc)
            filled.append(with_leaf_BC)
        logps_BC, entropies_BC, kls_BC = filled
        assert logps_BC is not None
        loss = self._loss(
            Scores(logps_BC=logps_BC, entropies_BC=entropies_BC, kls_BC=kls_BC, hidden_BCH=None, aux_loss=None)
        )
        found = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        return [None if scores_BC is None else next(found) for scores_BC in filled]


def _run_group(
    scorer: ChunkScorer, siblings: Siblings, losses: _ChunkLosses, gradients: Gradients
) -> list[ChunkScores]:
    """Score all chunks of a group, add the gradients of the loss, and return the scores without a graph."""
    chunks = scorer.batch.chunks(siblings)
    boundaries, states = _prefill(scorer, siblings, chunks)
    prompt = LeafStates(boundaries[-1] if boundaries else None)
    scored_chunks = []
    for chunk in chunks:
        scored = scorer.score(siblings, chunk, prompt.cache())
        scored_chunks.append(scored.detached())
        pairs = zip(scored.differentiable, losses.gradients(scored), strict=True)
        outputs = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
        prompt.add(gradients.backward(outputs, prompt.leaves))
        del scored, pairs, outputs  # the graph of this chunk is freed before the next one is built
    if states is None:
        backward_prompt(scorer, siblings, boundaries, prompt.grads(), gradients)
    else:
        gradients.backward(list(zip(states, prompt.grads(), strict=True)), [])
    return scored_chunks


def _prefill(
    scorer: ChunkScorer, siblings: Siblings, chunks: list[range]
) -> tuple[list[DynamicCache], list[Tensor] | None]:
    """The caches at the ends of the prompt's segments, and, if the graph of the prompt fits beside that of each chunk,
    the states at its end on that graph."""
    batch, lm, prompts = scorer.batch, scorer.lm, prompt_ids(scorer.batch, siblings)
    limit, width = batch.chunk_tokens, siblings.prompt_tokens
    assert limit is not None
    if all(len(chunk) * (width + siblings.lengths[chunk.start]) <= limit for chunk in chunks):
        cache = prefill(lm, prompts)
        return ([], []) if cache is None else ([cache], cache_states(cache))
    boundaries: list[DynamicCache] = []
    with torch.no_grad():
        for boundary in prefill_in_segments(lm, prompts, limit):
            boundaries = [*(share_prefix_storage(earlier, boundary) for earlier in boundaries), boundary]
    return boundaries, None
