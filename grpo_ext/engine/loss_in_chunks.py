"""The gradient of the loss of a micro-batch, in one pass over chunks of completions and in the memory of one chunk.

For losses whose gradient in a row does not depend on the scores of other rows. Each chunk is scored with a graph, the
gradient of the loss in its scores is computed, and the graph is run backward at once:

    prompt --> leaves --fork--> chunk 1 --> scores --> loss --backward--> gradients of the leaves --> prompt
                      --fork--> chunk 2 --> scores --> loss --backward-->

No forward is repeated, except those of prompts and completions that are longer than a chunk. `score_chunked.py` serves
all other losses, and runs every chunk twice.

Legend: B rows, C completion tokens, n rows of a chunk, c tokens of its longest completion.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.batch import ChunkScores, Scores, ScoringBatch, Siblings, assemble_scores, prompt_ids
from grpo_ext.engine.chunk_gradients import Gradients, LeafStates, backward_prompt
from grpo_ext.engine.chunk_indices import index_chunks
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.long_completions import LongCompletion
from grpo_ext.engine.moe_aux_loss import RouterRecorder
from grpo_ext.engine.prefill import cache_states, prefill, prefill_in_segments, with_boundary
from grpo_ext.engine.score import ChunkScorer, score


def loss_in_chunks(
    lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead, context: Callable[[], AbstractContextManager[Any]]
) -> Scores:
    """Scores without gradients, and `loss_gradient`, a 0 that has the gradient of `batch.loss`. Rows that fit one chunk
    are on one graph, as in `score`.

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
        with torch.enable_grad(), context():
            run = _run_whole if batch.fits_one_chunk() else _run_chunks
            scores = run(lm, batch, head, gradients)
        ctx.gradients = gradients.sums
        outputs = scores.logps_BC, scores.entropies_BC, scores.kls_BC
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return *outputs, scores.logps_BC.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        for i, grad in enumerate(gradients):
            gradients[i] = None if grad is None else grad * output_grads[3]
        return None, None, None, None, *gradients


def _run_whole(lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead, gradients: Gradients) -> Scores:
    """Run all rows on one graph."""
    assert batch.loss is not None
    scores = score(lm, batch, head)
    on_graph = [scores.logps_BC, scores.entropies_BC, scores.kls_BC]
    leaves = [None if part is None else part.detach().requires_grad_() for part in on_graph]
    gradients.backward(_pairs(on_graph, _loss_gradients(batch.loss, leaves, leaves)), [])
    return _scores(leaf if leaf is None else leaf.detach() for leaf in leaves)


def _run_chunks(lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead, gradients: Gradients) -> Scores:
    chunks: list[ChunkScores] = []
    losses = _ChunkLosses(batch)
    with RouterRecorder(lm, None) as router:
        groups = batch.joined_groups()
        scorer = ChunkScorer(lm=lm, batch=batch, head=head, router=router, indices=index_chunks(batch, groups))
        for siblings in groups:
            chunks += _run_group(scorer, siblings, losses, gradients)
    return assemble_scores(batch, chunks, None)


class _ChunkLosses:
    """The gradients of `batch.loss` in the scores of one chunk at a time.

    The loss is given the scores of all rows, so that it finds the sizes and the normaliser of the whole micro-batch.
    Scores of other chunks have no gradient; those of later chunks are 0.
    """

    def __init__(self, batch: ScoringBatch):
        assert batch.loss is not None
        self._loss = batch.loss
        shape, device = batch.completion_ids_BC.shape, batch.completion_ids_BC.device
        is_requested = True, batch.with_entropies, batch.ref_hidden_BCH is not None
        self._scores = [torch.zeros(shape, device=device) if requested else None for requested in is_requested]

    def gradients(self, chunk: ChunkScores) -> list[Tensor | None]:
        """The gradient of each score in `chunk.differentiable`."""
        leaves = [None if part is None else part.detach().requires_grad_() for part in chunk.differentiable]
        filled: list[Tensor | None] = []
        for scores_BC, leaf_nc in zip(self._scores, leaves, strict=True):
            with_leaf_BC = None
            if scores_BC is not None and leaf_nc is not None:
                padded_nC = pad(leaf_nc, (0, scores_BC.size(1) - leaf_nc.size(1)))
                with_leaf_BC = scores_BC.index_copy(0, chunk.rows_n, padded_nC)
                scores_BC.index_copy_(0, chunk.rows_n, padded_nC.detach())
            filled.append(with_leaf_BC)
        return _loss_gradients(self._loss, filled, leaves)


def _loss_gradients(
    loss: Callable[[Scores], Tensor], scores_BC: Sequence[Tensor | None], leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of the loss in each leaf; None if the leaf is None, or if the loss does not depend on it.

    Args:
        scores_BC: log-probs, entropies and exact KL of all rows, computed from the leaves.
    """
    inputs = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss(_scores(scores_BC)), inputs, allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def _scores(parts_BC: Iterable[Tensor | None]) -> Scores:
    logps_BC, entropies_BC, kls_BC = parts_BC
    assert logps_BC is not None
    return Scores(logps_BC=logps_BC, entropies_BC=entropies_BC, kls_BC=kls_BC, hidden_BCH=None, aux_loss=None)


def _pairs(outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(outputs, grads, strict=True)
    return [(output, grad) for output, grad in pairs if output is not None and grad is not None]


def _run_group(
    scorer: ChunkScorer, siblings: Siblings, losses: _ChunkLosses, gradients: Gradients
) -> list[ChunkScores]:
    """Score all chunks of a group, add the gradients of the loss, and return the scores without a graph."""
    chunks, limit = scorer.batch.chunks(siblings), scorer.batch.chunk_tokens
    assert limit is not None
    boundaries, states = _prefill(scorer, siblings, chunks)
    prompt = LeafStates(boundaries[-1] if boundaries else None)
    scored_chunks = []
    for chunk in chunks:
        if len(chunk) == 1 and siblings.lengths[chunk.start] > limit:
            completion = LongCompletion(scorer, siblings, chunk, prompt)
            scored_chunks.append(completion.score())
            completion.backward(losses.gradients(scored_chunks[-1]), gradients)
            continue
        scored = scorer.score(siblings, chunk, prompt.cache())
        scored_chunks.append(scored.detached())
        pairs = _pairs(scored.differentiable, losses.gradients(scored))
        prompt.add(gradients.backward(pairs, prompt.leaves))
        del scored, pairs  # the graph of this chunk is freed before the next one is built
    if states is None:
        backward_prompt(scorer, siblings, boundaries, prompt.grads(), gradients)
    else:
        gradients.backward(list(zip(states, prompt.grads(), strict=True)), [])
    return scored_chunks


def _prefill(
    scorer: ChunkScorer, siblings: Siblings, chunks: list[range]
) -> tuple[list[DynamicCache], list[Tensor] | None]:
    """The caches at the ends of the prompt's segments. If the graph of the prompt fits together with that of each
    chunk, also the states at its end on that graph."""
    batch, lm, prompts = scorer.batch, scorer.lm, prompt_ids(scorer.batch, siblings)
    limit, width = batch.chunk_tokens, siblings.prompt_tokens
    assert limit is not None
    if all(len(chunk) * (width + siblings.lengths[chunk.start]) <= limit for chunk in chunks):
        cache = prefill(lm, prompts)
        return ([], []) if cache is None else ([cache], cache_states(cache))
    boundaries: list[DynamicCache] = []
    with torch.no_grad():
        for boundary in prefill_in_segments(lm, prompts, limit):
            boundaries = with_boundary(boundaries, boundary)
    return boundaries, None
