"""The load-balancing loss of a mixture of experts, summed over the forwards into which shared prompts split a batch.

Switch Transformer (arXiv:2101.03961), equations 4 to 6, as transformers' `load_balancing_loss_func` computes it over a
padded batch:

    loss = E * sum_e  (share of the choices that went to expert e) * (mean probability of expert e)

Both are means over the tokens of all rows and layers. A prompt runs once but counts once per row. Choices have no
gradient, so the gradient of one forward is that of its own probabilities, given the choices of all forwards.

Legend: E experts, N tokens of a forward, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class RouterSums:
    """Weighted sums over tokens and layers: choices per expert, probabilities per expert, and the number of tokens."""

    chosen_E: Tensor
    probs_E: Tensor
    tokens: Tensor

    @classmethod
    def from_logits(cls, router_logits: Sequence[Tensor], weights_N: Tensor, top_k: int) -> "RouterSums":
        """Sums over one forward; the router logits of each layer have shape (N, E)."""
        chosen, probs = [], []
        for logits_NE in router_logits:
            probs_NE = logits_NE.flatten(0, -2).softmax(dim=-1).float()
            is_chosen_NE = torch.zeros_like(probs_NE).scatter_(1, probs_NE.topk(top_k, dim=-1).indices, 1.0)
            chosen.append(weights_N @ is_chosen_NE)
            probs.append(weights_N @ probs_NE)
        return cls(_sum(chosen), _sum(probs), weights_N.sum() * len(router_logits))

    def loss(self) -> Tensor:
        """The loss of the whole batch; these must be the sums over all of its forwards."""
        return (self.chosen_E * self.probs_E).sum() * len(self.chosen_E) / self.tokens**2

    def loss_share(self, total: "RouterSums") -> Tensor:
        """The share of this forward in the loss of the whole batch, with its gradient."""
        return (total.chosen_E * self.probs_E).sum() * len(self.chosen_E) / total.tokens**2


def total_router_sums(parts: Sequence[RouterSums | None]) -> RouterSums | None:
    """Sums over all forwards; None if router statistics were not recorded."""
    recorded = [part for part in parts if part is not None]
    if not recorded:
        return None
    return RouterSums(*(_sum([getattr(part, name) for part in recorded]) for name in ("chosen_E", "probs_E", "tokens")))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors)).sum(dim=0)


class RouterRecorder:
    """A context that records the router logits of each forward of a backbone.

    Args:
        top_k: experts per token; None records nothing.

    Attributes:
        forward_options: keyword arguments to pass to each forward.
    """

    def __init__(self, lm: PreTrainedModel, top_k: int | None):
        self.forward_options = {} if top_k is None else {"output_router_logits": True}
        self._backbone, self._top_k = lm.base_model, top_k
        self._router_logits: tuple[Tensor, ...] = ()

    def __enter__(self) -> "RouterRecorder":
        self._hook = self._backbone.register_forward_hook(self._record)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _record(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._router_logits = output.router_logits if self._top_k is not None else ()

    def pop_sums(self, weights: Tensor) -> RouterSums | None:
        """Sums of the last forward, each token counted with its weight.

        Args:
            weights: same shape as the input ids of that forward.
        """
        if self._top_k is None:
            return None
        router_logits, self._router_logits = self._router_logits, ()
        return RouterSums.from_logits(router_logits, weights.flatten().float(), self._top_k)
