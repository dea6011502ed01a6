"""Scoring with gradients, in chunks: the result of `score.py` in the memory of one chunk.

The forward keeps no graph. The backward runs the completions in chunks on leaf copies of the prompt's states, so the
gradients of all siblings add up in the leaves. It then sends these gradients through the prompt, one segment at a time,
last to first:

    leaves --fork--> chunk 1 --backward--> gradients of the leaves --> segment 2 --> those at its start --> segment 1
           --fork--> chunk 2 --backward-->

The result is exact. For any G, the memory is that of one chunk, plus the prompt's states and their gradients. The cost
is one additional forward, as with gradient checkpointing, which this replaces.

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
    prompt_weights,
)
from grpo_ext.engine.chunk_gradients import Gradients, LeafStates, RouterShares, backward_prompt
from grpo_ext.engine.chunk_indices import index_chunks
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.moe_aux_loss import RouterRecorder, total_router_sums
from grpo_ext.engine.prefill import (
    prefill_in_segments,
    prompt_segments,
    with_boundary,
)
from grpo_ext.engine.score import ChunkScorer


def score_in_chunks(
    lm: PreTrainedModel, batch: ScoringBatch, head: TiledHead, context: Callable[[], AbstractContextManager[Any]]
) -> Scores:
    """`score` with gradients; at most `batch.chunk_tokens` tokens carry a graph at any one time.

    Args:
        context: entered by the backward, to run the model as the forward did (autocast on or off, checkpointing off).
    """
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    logps_BC, entropies_BC, kls_BC, aux_loss = _ChunkedScore.apply(lm, batch, head, context, *parameters)
    return Scores(logps_BC=logps_BC, entropies_BC=entropies_BC, kls_BC=kls_BC, hidden_BCH=None, aux_loss=aux_loss)


class _ChunkedScore(torch.autograd.Function):
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
        """Compute all scores without a graph, and keep the prompt states of each group."""
        ctx.set_materialize_grads(False)  # an output that is not differentiated costs nothing
        ctx.lm, ctx.batch, ctx.head, ctx.context, ctx.parameters = lm, batch, head, context, parameters
        ctx.boundaries = []  # per group, the caches at the ends of the prompt's segments
        chunks: list[ChunkScores] = []
        prompt_sums = []
        with RouterRecorder(lm, batch.experts_per_token) as router:
            ctx.indices = index_chunks(batch, batch.all_groups)
            scorer = ChunkScorer(lm=lm, batch=batch, head=head, router=router, indices=ctx.indices)
            for siblings in batch.all_groups:
                boundaries: list[DynamicCache] = []
                segments = prompt_segments(siblings.prompt_tokens - 1, batch.chunk_tokens)
                caches = prefill_in_segments(
                    lm, prompt_ids(batch, siblings), batch.chunk_tokens, **router.forward_options
                )
                for segment, boundary in zip(segments, caches, strict=True):
                    prompt_sums.append(router.pop_sums(prompt_weights(batch, siblings, len(segment))))
                    boundaries = with_boundary(boundaries, boundary)
                last = boundaries[-1] if boundaries else None
                chunks += [scorer.score(siblings, chunk, last) for chunk in batch.chunks(siblings)]
                ctx.boundaries.append(boundaries)
        ctx.total_sums = total_router_sums(prompt_sums + [chunk.router_sums for chunk in chunks])
        scores = assemble_scores(batch, chunks, None if ctx.total_sums is None else ctx.total_sums.loss())
        return scores.logps_BC, scores.entropies_BC, scores.kls_BC, scores.aux_loss

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> Any:
        """Gradients of the parameters, group by group: first the completions, then their prompt."""
        gradients, shares = Gradients(ctx.parameters), RouterShares(ctx.total_sums, output_grads[3])
        with torch.enable_grad(), ctx.context(), RouterRecorder(ctx.lm, ctx.batch.experts_per_token) as router:
            scorer = ChunkScorer(lm=ctx.lm, batch=ctx.batch, head=ctx.head, router=router, indices=ctx.indices)
            for siblings, boundaries in zip(ctx.batch.all_groups, ctx.boundaries, strict=True):
                state_grads = _backward_completions(scorer, siblings, boundaries, output_grads, gradients, shares)
                backward_prompt(scorer, siblings, boundaries, state_grads, gradients, shares)
        return None, None, None, None, *gradients.sums


def _backward_completions(
    scorer: ChunkScorer,
    siblings: Siblings,
    boundaries: list[DynamicCache],
    output_grads: tuple[Tensor | None, ...],
    gradients: Gradients,
    shares: RouterShares,
) -> list[Tensor]:
    """Run the chunks of one group on leaf states; returns the gradient of each prompt state, summed over siblings."""
    prompt = LeafStates(boundaries[-1] if boundaries else None)
    for chunk in scorer.batch.chunks(siblings):
        scored = scorer.score(siblings, chunk, prompt.cache())
        outputs = [
            (output, grad.index_select(0, scored.rows_n)[:, : output.size(1)])
            for output, grad in zip(scored.differentiable, output_grads, strict=False)
            if output is not None and grad is not None
        ]
        prompt.add(gradients.backward(outputs + shares.of(scored.router_sums), prompt.leaves))
    return prompt.grads()
