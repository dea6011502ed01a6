"""Gradients that are summed over the chunks of a micro-batch: those of the parameters, and those of a prompt's states.

The completions of a group begin at copies of the prompt's states, so the gradients of all siblings add up there. They
are then sent through the prompt, one segment at a time, last to first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from grpo_ext.engine.batch import Siblings, prompt_ids, prompt_weights
from grpo_ext.engine.moe_aux_loss import RouterSums
from grpo_ext.engine.prefill import cache_states, fork, prefill_segment, prompt_segments, with_states
from grpo_ext.engine.score import ChunkScorer


class Gradients:
    """Gradients of the parameters, summed over chunks.

    Attributes:
        sums: one per parameter; None as long as nothing depends on it.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...]):
        self._parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def backward(self, outputs: Sequence[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
        """Add the gradients of the parameters to `sums`, and return those of the leaves.

        Args:
            outputs: pairs of an output and its gradient.
        """
        outputs = [(output, grad) for output, grad in outputs if output.requires_grad]
        if not outputs:  # a prompt may depend on no trainable parameter
            return [torch.zeros_like(leaf) for leaf in leaves]
        inputs = (*leaves, *self._parameters)
        grads = torch.autograd.grad([o for o, _ in outputs], inputs, [g for _, g in outputs], allow_unused=True)
        for i, grad in enumerate(grads[len(leaves) :]):
            if grad is not None:
                sum_ = self.sums[i]
                self.sums[i] = grad if sum_ is None else sum_.add_(grad)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=False)]


class LeafStates:
    """Copies of a prompt's states, at which the graphs of its completions begin, and the sums of their gradients."""

    def __init__(self, cache: DynamicCache | None):
        self._cache = cache
        self.leaves = [] if cache is None else [state.detach().requires_grad_() for state in cache_states(cache)]
        # In 16 bits, a sum over many siblings would round each addend.
        self._sums = [
            torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in self.leaves
        ]

    def cache(self) -> DynamicCache | None:
        """A cache on the leaves; None for a prompt of one token."""
        return None if self._cache is None else with_states(self._cache, self.leaves)

    def add(self, grads: list[Tensor]) -> None:
        """Add one gradient per leaf."""
        for sum_, grad in zip(self._sums, grads, strict=True):
            sum_.add_(grad)

    def grads(self) -> list[Tensor]:
        """The sums, in the dtypes of the states."""
        return [sum_.to(leaf.dtype) for sum_, leaf in zip(self._sums, self.leaves, strict=True)]


@dataclass(frozen=True)
class RouterShares:
    """The share of each chunk in the load-balancing loss of the whole batch.

    Attributes:
        total: router sums of the whole batch; None if that loss is not requested.
        grad: gradient of that loss.
    """

    total: RouterSums | None
    grad: Tensor | None

    def of(self, router_sums: RouterSums | None) -> list[tuple[Tensor, Tensor]]:
        """The share of a chunk with these sums, and its gradient; an empty list if there is none."""
        if router_sums is None or self.total is None or self.grad is None:
            return []
        return [(router_sums.loss_share(self.total), self.grad)]


def backward_prompt(
    scorer: ChunkScorer,
    siblings: Siblings,
    boundaries: list[DynamicCache],
    state_grads: list[Tensor],
    gradients: Gradients,
    shares: RouterShares = RouterShares(None, None),
) -> None:
    """Send the gradients of the prompt's states through its segments, last to first."""
    lm, batch, router = scorer.lm, scorer.batch, scorer.router
    prompts = prompt_ids(batch, siblings)
    segments = prompt_segments(siblings.prompt_tokens - 1, batch.chunk_tokens)
    for k in reversed(range(len(segments))):
        leaves, before = [], None
        if k > 0:
            leaves = [state.detach().requires_grad_() for state in cache_states(boundaries[k - 1])]
            before = fork(with_states(boundaries[k - 1], leaves), range(len(prompts)))
        states = cache_states(prefill_segment(lm, prompts, segments[k], before, **router.forward_options))
        router_sums = router.pop_sums(prompt_weights(batch, siblings, len(segments[k])))
        outputs = [*zip(states, state_grads, strict=True), *shares.of(router_sums)]
        state_grads = gradients.backward(outputs, leaves)
        del before, states, router_sums, outputs  # freed before those of the next segment are allocated
