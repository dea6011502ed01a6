"""Log-probs and entropies of completions, with every prompt read once for all of its siblings.

In: TRL's padded rows [prompt | completion]. Out: what TRL's own scoring gives, shape (B, C), rows in their order.

    prompt[:-1] --(batch of 1)--> states --fork--> [last prompt token | completion[:-1]] of each sibling -> log-probs

With gradients and a token budget, `score_in_chunks` keeps no graph in the forward. Its backward runs the completions in
chunks on leaf copies of the states, so that the gradients of all siblings add up in the leaves, and then sends these
through the prompt, in segments, last to first. The result is exact, and the memory is that of one chunk whatever G is,
beside the prompt's states and their gradients.

Legend: B rows, S prompt tokens, C completion tokens, n rows of a chunk, c tokens of its longest completion.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.groups import Siblings, cut_rows, of_one_length
from grpo_ext.engine.prompt_cache import fork, read_states, slice_of, write_states
from grpo_ext.engine.reading import read, read_in_segments, read_segment, segments


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A micro-batch to score.

    Attributes:
        completion_ids_BC: padded on the right; what stands on padding is not read.
        siblings: the rows by prompt.
        max_rows: rows of one forward at most; None for whole groups.
        chunk_tokens: tokens that carry a graph at once; None for no bound.
    """

    completion_ids_BC: Tensor
    siblings: list[Siblings]
    max_rows: int | None = None
    chunk_tokens: int | None = None

    def chunks(self, siblings: Siblings) -> list[range]:
        return cut_rows(siblings, self.max_rows, self.chunk_tokens)

    def fit_one_chunk(self) -> bool:
        """Whether a plain graph over everything stays within the budget."""
        if self.chunk_tokens is None:
            return True
        tokens = sum((1 + len(s.rows)) * s.prompt_tokens + len(s.rows) * s.lengths[0] for s in self.siblings)
        return tokens <= self.chunk_tokens


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A chunk of a group: which rows of the micro-batch, and what they scored."""

    rows: list[int]
    logps_nc: Tensor
    entropies_nc: Tensor | None


def score(lm: PreTrainedModel, rows: Rows, head: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
    """Score on the graph that the caller's grad mode asks for, all of it at once.

    Args:
        lm: a causal language model; it must give a `DynamicCache` that can be forked.
        head: its forward with TRL's fused head: `head(input_ids=..., shift_labels=..., fused_lm_head=True, ...)`.

    Returns:
        logps_BC, entropies_BC: float32, 0 on padding; no entropies where the head gives none (a reference model's).
    """
    chunks = []
    for siblings in of_one_length(rows.siblings, rows.max_rows, rows.chunk_tokens):
        cache = read(lm, _prompt_ids(rows, siblings))
        chunks += [_score_chunk(head, rows, siblings, chunk, cache) for chunk in rows.chunks(siblings)]
    return _assemble(rows, chunks)


def score_in_chunks(
    lm: PreTrainedModel, rows: Rows, head: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor]:
    """`score` with gradients, of which at most `rows.chunk_tokens` tokens carry a graph at once; the same result.

    Args:
        context: what the backward must re-enter to see the model that the forward saw (autocast, checkpointing off).
    """
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    return _ChunkedScore.apply(lm, rows, head, context, *parameters)


class _ChunkedScore(torch.autograd.Function):
    """The trainable parameters are inputs and their gradients are returned, so that hooks on them (DDP) fire once."""

    @staticmethod
    def forward(
        ctx: Any, lm: PreTrainedModel, rows: Rows, head: Callable, context: Callable, *parameters: nn.Parameter
    ) -> Any:
        ctx.lm, ctx.rows, ctx.head, ctx.context, ctx.parameters = lm, rows, head, context, parameters
        ctx.boundaries = []  # of each group, the caches at the ends of the prompt's segments
        chunks = []
        for siblings in rows.siblings:
            boundaries: list[DynamicCache] = []
            for boundary in read_in_segments(lm, _prompt_ids(rows, siblings), rows.chunk_tokens):
                boundaries = [*(slice_of(earlier, boundary) for earlier in boundaries), boundary]
            last = boundaries[-1] if boundaries else None
            chunks += [_score_chunk(head, rows, siblings, chunk, last) for chunk in rows.chunks(siblings)]
            ctx.boundaries.append(boundaries)
        return _assemble(rows, chunks)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        gradients = _Gradients(ctx.parameters)
        with torch.enable_grad(), ctx.context():
            for siblings, boundaries in zip(ctx.rows.siblings, ctx.boundaries, strict=True):
                state_grads = _backward_completions(ctx, siblings, boundaries, output_grads, gradients)
                _backward_prompt(ctx, siblings, boundaries, state_grads, gradients)
        return None, None, None, None, *gradients.sums


class _Gradients:
    """Gradients of the parameters, added up over chunks."""

    def __init__(self, parameters: tuple[nn.Parameter, ...]):
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def backward(self, outputs: list[Tensor], output_grads: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        """Add the parameters' share, and return that of the leaves."""
        inputs = (*leaves, *self.parameters)
        grads = torch.autograd.grad(outputs, inputs, output_grads, allow_unused=True)
        for i, grad in enumerate(grads[len(leaves) :]):
            if grad is not None:
                total = self.sums[i]
                self.sums[i] = grad if total is None else total.add_(grad)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=False)]


def _backward_completions(
    ctx: Any,
    siblings: Siblings,
    boundaries: list[DynamicCache],
    output_grads: tuple[Tensor, ...],
    gradients: _Gradients,
) -> list[Tensor]:
    """Run the chunks of one group on leaves; the gradient of each state of the prompt, over all siblings."""
    leaves = [state.detach().requires_grad_() for state in read_states(boundaries[-1])] if boundaries else []
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for chunk in ctx.rows.chunks(siblings):
        cache = write_states(boundaries[-1], leaves) if boundaries else None
        scored = _score_chunk(ctx.head, ctx.rows, siblings, chunk, cache)
        assert scored.entropies_nc is not None  # a model that trains has a head that gives them
        outputs = [scored.logps_nc, scored.entropies_nc]
        wanted = [grad[scored.rows, : output.size(1)] for grad, output in zip(output_grads, outputs, strict=True)]
        for total, grad in zip(totals, gradients.backward(outputs, wanted, leaves), strict=True):
            total.add_(grad)
    return totals


def _backward_prompt(
    ctx: Any, siblings: Siblings, boundaries: list[DynamicCache], state_grads: list[Tensor], gradients: _Gradients
) -> None:
    """Send the gradients of the prompt's states through its segments, last to first."""
    prompts = _prompt_ids(ctx.rows, siblings)
    cuts = segments(prompts.size(1) - 1, ctx.rows.chunk_tokens)
    for k in reversed(range(len(cuts))):
        leaves, before = [], None
        if k > 0:
            leaves = [state.detach().requires_grad_() for state in read_states(boundaries[k - 1])]
            before = fork(write_states(boundaries[k - 1], leaves), range(len(prompts)))
        states = read_states(read_segment(ctx.lm, prompts, cuts[k], before))
        live = [(state, grad) for state, grad in zip(states, state_grads, strict=True) if state.requires_grad]
        if live:  # else the prompt reaches no trainable parameter
            state_grads = gradients.backward([s for s, _ in live], [g for _, g in live], leaves)
        del before, states, live  # else they last until those of the next segment are there


def _score_chunk(
    head: Callable[..., Any], rows: Rows, siblings: Siblings, chunk: range, cache: DynamicCache | None
) -> _Scored:
    """Some rows of a group, on a fork of the prompt's cache."""
    members = [siblings.rows[i] for i in chunk]
    longest = siblings.lengths[chunk.start]
    prompt_of = [siblings.prompt_of[i] for i in chunk]
    last_tokens = [siblings.prompts[i][-1] for i in prompt_of]
    targets_nc = rows.completion_ids_BC[members, :longest]
    # Recurrent layers take a single token on a cache as a decoding step, which writes into the states in place.
    targets_nc = pad(targets_nc, (0, max(0, 2 - longest)))
    lengths_n = torch.tensor([siblings.lengths[i] for i in chunk], device=targets_nc.device)
    positions_c = torch.arange(targets_nc.size(1), device=targets_nc.device)
    first_n1 = targets_nc.new_tensor(last_tokens).unsqueeze(1)
    output = head(
        input_ids=torch.cat([first_n1, targets_nc[:, :-1]], dim=1),
        # Padding stands on the right, where no token of the row looks: no attention mask is needed.
        past_key_values=None if cache is None else fork(cache, prompt_of),
        position_ids=(siblings.prompt_tokens - 1 + positions_c).unsqueeze(0),
        shift_labels=targets_nc.masked_fill(positions_c >= lengths_n.unsqueeze(1), -100),
        fused_lm_head=True,
    )
    entropies_nc = None if output.entropy is None else output.entropy[:, :longest]
    return _Scored(rows=members, logps_nc=output.log_probs[:, :longest], entropies_nc=entropies_nc)


def _assemble(rows: Rows, chunks: list[_Scored]) -> tuple[Tensor, Tensor | None]:
    """Pad the chunks to C and put their rows back into the order of the micro-batch; rows without tokens are 0."""
    B, C = rows.completion_ids_BC.shape
    order = [row for chunk in chunks for row in chunk.rows]
    empty = sorted(set(range(B)) - set(order))
    back = torch.tensor(order + empty, device=rows.completion_ids_BC.device).argsort()

    def together(parts: list[Tensor]) -> Tensor:
        padded = [pad(part, (0, C - part.size(1))) for part in parts]
        return torch.cat([*padded, padded[0].new_zeros(len(empty), C)])[back]

    entropies = [chunk.entropies_nc for chunk in chunks if chunk.entropies_nc is not None]
    return together([chunk.logps_nc for chunk in chunks]), together(entropies) if entropies else None


def _prompt_ids(rows: Rows, siblings: Siblings) -> Tensor:
    return torch.tensor(siblings.prompts, device=rows.completion_ids_BC.device)
