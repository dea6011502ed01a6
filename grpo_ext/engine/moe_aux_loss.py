"""The load-balancing loss of mixtures of experts, summed over the parts in which shared prompts are run.

Switch Transformer, equations 4 to 6, as transformers' `load_balancing_loss_func` computes it over a padded batch:

    loss = E * sum_e  (share of the choices that fell on expert e) * (mean probability of expert e)

Both are means over the tokens of all rows and layers. A prompt that is run once counts once for each of its rows; the
choices have no gradient, so a part of the batch has the gradient of its own probabilities, given all choices.

Legend: E experts, N tokens of a part, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class RouterSums:
    """Over tokens, weighted, and layers: choices of each expert, probabilities of each, and the tokens themselves."""

    chosen_E: Tensor
    probs_E: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, router_logits: Sequence[Tensor], weights_N: Tensor, top_k: int) -> "RouterSums":
        """Sums over one part, its router logits shaped (N, E) in each layer."""
        chosen, probs = [], []
        for logits_NE in router_logits:
            probs_NE = logits_NE.flatten(0, -2).softmax(dim=-1).float()
            is_chosen_NE = torch.zeros_like(probs_NE).scatter_(1, probs_NE.topk(top_k, dim=-1).indices, 1.0)
            chosen.append(weights_N @ is_chosen_NE)
            probs.append(weights_N @ probs_NE)
        return cls(_sum(chosen), _sum(probs), weights_N.sum() * len(router_logits))

    def loss(self) -> Tensor:
        return (self.chosen_E * self.probs_E).sum() * len(self.chosen_E) / self.tokens**2

    def loss_given(self, everything: "RouterSums") -> Tensor:
        """This part's share in the loss of the whole batch, with its gradient."""
        return (everything.chosen_E * self.probs_E).sum() * len(self.chosen_E) / everything.tokens**2


def total(parts: Sequence[RouterSums | None]) -> RouterSums | None:
    """The sums over all parts; None where routers were not asked."""
    asked = [part for part in parts if part is not None]
    if not asked:
        return None
    return RouterSums(*(_sum([getattr(part, name) for part in asked]) for name in ("chosen_E", "probs_E", "tokens")))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors)).sum(dim=0)


class RouterRecorder:
    """Listens to the routers of a backbone, forward by forward, while it is entered.

    Args:
        top_k: experts that a token is sent to; None for a model whose routers nobody asks for.

    Attributes:
        options: keywords for each forward.
    """

    def __init__(self, lm: PreTrainedModel, top_k: int | None):
        self.forward_options = {} if top_k is None else {"output_router_logits": True}
        self._backbone, self._top_k = lm.base_model, top_k
        self._heard: tuple[Tensor, ...] = ()

    def __enter__(self) -> "RouterRecorder":
        self._hook = self._backbone.register_forward_hook(self._record)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _record(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._heard = output.router_logits if self._top_k is not None else ()

    def pop_sums(self, weights: Tensor) -> RouterSums | None:
        """The sums of the last forward, each token with its weight; shaped as the ids that went in."""
        if self._top_k is None:
            return None
        heard, self._heard = self._heard, ()
        return RouterSums.of(heard, weights.flatten().float(), self._top_k)
