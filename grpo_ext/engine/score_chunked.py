"""Scoring with gradients in chunks: the same result as `scoring.py`, in the memory of one chunk.

The forward keeps no graph. The backward runs the completions in chunks on leaf copies of the prompt's states, so that
the gradients of all siblings add up in the leaves, and then sends these through the prompt, in segments, last to first:

    leaves --fork--> chunk 1 --backward--> gradients of the leaves --> segment 2 --> those at its start --> segment 1
           --fork--> chunk 2 --backward-->

The result is exact, and the memory is that of one chunk whatever G is, beside the prompts' states and their gradients.
The price is one more forward, that of gradient checkpointing, whose place it takes.

Legend: B rows, C completion tokens, n rows of a chunk, c tokens of its longest completion.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.batch import Chunk, Scores, ScoringBatch, Siblings, assemble_scores, prompt_ids, prompt_weights
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.moe_aux_loss import RouterRecorder, RouterSums, total
from grpo_ext.engine.prefill import (
    cache_states,
    fork,
    prefill_in_segments,
    prefill_segment,
    prompt_segments,
    share_prefix_storage,
    with_states,
)
from grpo_ext.engine.score import Scorer


def score_in_chunks(
    lm: PreTrainedModel, rows: ScoringBatch, head: TiledHead, context: Callable[[], AbstractContextManager[Any]]
) -> Scores:
    """`score` with gradients, of which at most `rows.chunk_tokens` tokens carry a graph at once; the same result.

    Args:
        context: what the backward must re-enter to see the model that the forward saw (autocast, checkpointing off).
    """
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    logps_BC, entropies_BC, kls_BC, aux_loss = _ChunkedScore.apply(lm, rows, head, context, *parameters)
    return Scores(logps_BC=logps_BC, entropies_BC=entropies_BC, kls_BC=kls_BC, hidden_BCH=None, aux_loss=aux_loss)


class _ChunkedScore(torch.autograd.Function):
    """The trainable parameters are inputs and their gradients are returned, so that hooks on them (DDP) fire once."""

    @staticmethod
    def forward(
        ctx: Any, lm: PreTrainedModel, rows: ScoringBatch, head: TiledHead, context: Callable, *parameters: nn.Parameter
    ) -> Any:
        """Every score without a graph; each group's prompt states are kept."""
        ctx.set_materialize_grads(False)  # what nobody differentiates costs nothing
        ctx.lm, ctx.rows, ctx.head, ctx.context, ctx.parameters = lm, rows, head, context, parameters
        ctx.boundaries = []  # of each group, the caches at the ends of the prompt's segments
        chunks: list[Chunk] = []
        routed = []  # of the prompts
        with RouterRecorder(lm, rows.experts_per_token) as routing:
            scorer = Scorer(lm=lm, rows=rows, head=head, routing=routing)
            for siblings in rows.all_groups:
                boundaries: list[DynamicCache] = []
                cuts = prompt_segments(siblings.prompt_tokens - 1, rows.chunk_tokens)
                reading = prefill_in_segments(
                    lm, prompt_ids(rows, siblings), rows.chunk_tokens, **routing.forward_options
                )
                for segment, boundary in zip(cuts, reading, strict=True):
                    routed.append(routing.pop_sums(prompt_weights(rows, siblings, len(segment))))
                    boundaries = [*(share_prefix_storage(earlier, boundary) for earlier in boundaries), boundary]
                last = boundaries[-1] if boundaries else None
                chunks += [scorer.score(siblings, chunk, last) for chunk in rows.chunks(siblings)]
                ctx.boundaries.append(boundaries)
        ctx.routed = total(routed + [chunk.routed for chunk in chunks])
        scores = assemble_scores(rows, chunks, None if ctx.routed is None else ctx.routed.loss())
        return scores.logps_BC, scores.entropies_BC, scores.kls_BC, scores.aux_loss

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> Any:
        """The parameters' gradients, group by group: completions first, then the prompt they go on from."""
        gradients = _Gradients(ctx.parameters, ctx.routed, aux_loss_grad=output_grads[3])
        with torch.enable_grad(), ctx.context(), RouterRecorder(ctx.lm, ctx.rows.experts_per_token) as routing:
            scorer = Scorer(lm=ctx.lm, rows=ctx.rows, head=ctx.head, routing=routing)
            for siblings, boundaries in zip(ctx.rows.all_groups, ctx.boundaries, strict=True):
                state_grads = _backward_completions(scorer, siblings, boundaries, output_grads, gradients)
                _backward_prompt(scorer, siblings, boundaries, state_grads, gradients)
        return None, None, None, None, *gradients.sums


class _Gradients:
    """Gradients of the parameters, added up over chunks."""

    def __init__(self, parameters: tuple[nn.Parameter, ...], routed: RouterSums | None, aux_loss_grad: Tensor | None):
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self._routed, self._aux_loss_grad = routed, aux_loss_grad

    def backward(
        self, outputs: list[Tensor], output_grads: list[Tensor], leaves: list[Tensor], routed: RouterSums | None
    ) -> list[Tensor]:
        """Add the parameters' share, and return that of the leaves.

        Args:
            routed: what this chunk adds to the sums over everything, in whose load-balancing loss it has its share.
        """
        pairs = list(zip(outputs, output_grads, strict=True))
        if routed is not None and self._routed is not None and self._aux_loss_grad is not None:
            pairs.append((routed.loss_given(self._routed), self._aux_loss_grad))
        pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
        if not pairs:  # a prompt may reach no trainable parameter
            return [torch.zeros_like(leaf) for leaf in leaves]
        inputs = (*leaves, *self.parameters)
        grads = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        for i, grad in enumerate(grads[len(leaves) :]):
            if grad is not None:
                sum_ = self.sums[i]
                self.sums[i] = grad if sum_ is None else sum_.add_(grad)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=False)]


def _backward_completions(
    scorer: Scorer,
    siblings: Siblings,
    boundaries: list[DynamicCache],
    output_grads: tuple[Tensor | None, ...],
    gradients: _Gradients,
) -> list[Tensor]:
    """Run the chunks of one group on leaves; the gradient of each state of the prompt, over all siblings."""
    leaves = [state.detach().requires_grad_() for state in cache_states(boundaries[-1])] if boundaries else []
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for chunk in scorer.rows.chunks(siblings):
        cache = with_states(boundaries[-1], leaves) if boundaries else None
        scored = scorer.score(siblings, chunk, cache)
        outputs, wanted = [], []
        for output, grad in zip(scored.differentiable, output_grads, strict=False):
            if output is not None and grad is not None:
                outputs.append(output)
                wanted.append(grad[scored.rows, : output.size(1)])
        for sum_, grad in zip(totals, gradients.backward(outputs, wanted, leaves, scored.routed), strict=True):
            sum_.add_(grad)
    return totals


def _backward_prompt(
    scorer: Scorer,
    siblings: Siblings,
    boundaries: list[DynamicCache],
    state_grads: list[Tensor],
    gradients: _Gradients,
) -> None:
    """Send the gradients of the prompt's states through its segments, last to first."""
    lm, rows, routing = scorer.lm, scorer.rows, scorer.routing
    prompts = prompt_ids(rows, siblings)
    cuts = prompt_segments(siblings.prompt_tokens - 1, rows.chunk_tokens)
    for k in reversed(range(len(cuts))):
        leaves, before = [], None
        if k > 0:
            leaves = [state.detach().requires_grad_() for state in cache_states(boundaries[k - 1])]
            before = fork(with_states(boundaries[k - 1], leaves), range(len(prompts)))
        states = cache_states(prefill_segment(lm, prompts, cuts[k], before, **routing.forward_options))
        routed = routing.pop_sums(prompt_weights(rows, siblings, len(cuts[k])))
        state_grads = gradients.backward(states, state_grads, leaves, routed)
        del before, states, routed  # else they last until those of the next segment are there
