"""The LM head of a causal language model, in tiles: from hidden states to log-probs, entropies and an exact KL, without
the logits of the whole vocabulary.

In: hidden states of tokens that are to be scored, in one row, and what comes next. Out: one number a token, float32.

The tiles are TRL's kernels; on a GPU they are Triton's. With an adapter on the head they are `low_rank_head.py`'s.

Legend: T tokens, H hidden size.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from grpo_ext.model.unwrap import head_of

VOCAB_TILE = 32768  # as TRL has it
KL_TOKEN_TILE = 512  # of a tile for the exact KL, which holds two of them in float32


@dataclass(frozen=True, kw_only=True)
class TiledHead:
    """Scores hidden states of `lm`.

    Attributes:
        softcap: bound on the logits (`final_logit_softcapping`); None for none.
        scale: factor on the logits before that.
    """

    lm: PreTrainedModel
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, lm: PreTrainedModel, fused_forward: Callable[..., Any]) -> "TiledHead":
        """The head that TRL's `add_fused_lm_head` gave the model: softcap and scale are what it found in the config."""
        found = inspect.getclosurevars(fused_forward).nonlocals
        return cls(lm=lm, softcap=found["final_logit_softcapping"], scale=found["logit_scale"])

    def score(
        self, hidden_TH: Tensor, targets_T: Tensor, temperature: float, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets and, where asked for, entropies in nats, of softmax(logits / temperature)."""
        lm_head = self.lm.get_output_embeddings()
        outputs = ("log_probs", "entropy") if with_entropies else ("log_probs",)
        tile = min(VOCAB_TILE, lm_head.weight.size(0))
        hidden_TH = hidden_TH.to(lm_head.weight.device)
        low_rank = active_head_lora(self.lm, hidden_TH)
        if low_rank is not None:
            logits = LogitScale(temperature=temperature, softcap=self.softcap, scale=self.scale)
            return score_with_lora(hidden_TH, lm_head, low_rank, targets_T, logits, with_entropies=with_entropies)
        logps_T, entropies_T, *_ = ChunkedLogProbFunction.apply(
            hidden_TH, lm_head.weight, lm_head.bias, targets_T, temperature, tile, self.softcap, self.scale, outputs
        )
        return logps_T, entropies_T

    def divergence(self, hidden_TH: Tensor, ref_hidden_TH: Tensor, temperature: float) -> Tensor:
        """KL(policy || reference) of each token's whole distribution, in nats, with the policy's gradient.

        Args:
            hidden_TH: of the policy.
            ref_hidden_TH: of the reference, which has the same, frozen head.
        """
        lm_head = self.lm.get_output_embeddings()
        head = (lm_head.weight, lm_head.bias)
        logits = (self.scale, self.softcap)
        parts = zip(hidden_TH.split(KL_TOKEN_TILE), ref_hidden_TH.split(KL_TOKEN_TILE), strict=True)
        kls = [
            ChunkedDivergenceFunction.apply(hidden, *head, reference, *head, 1.0, temperature, *logits, *logits)[0]
            for hidden, reference in parts
        ]
        return torch.cat(kls)


TILE = (1024, 32768)  # tokens x words; TRL has four times the tokens, without copies of a tile in float32


class HeadLoRA(NamedTuple):
    """What adapters add to the logits: `states_TR @ factor_VR.T`, with a graph to hidden states, A and B."""

    states_TR: Tensor
    factor_VR: Tensor


class LogitScale(NamedTuple):
    """How logits come from a projection x: softcap tanh(scale x / softcap) / temperature; without a softcap, linear."""

    temperature: float
    softcap: float | None
    scale: float

    def of_(self, projected: Tensor) -> Tensor:
        """The logits, in place."""
        logits = projected.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d projection."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return (1 - (logits * (self.temperature / self.softcap)) ** 2) * slope


def active_head_lora(lm: PreTrainedModel, hidden_TH: Tensor) -> HeadLoRA | None:
    """Of the adapters on the LM head that are active now; None where none is, as in `disable_adapter()`."""
    layer = head_of(lm)
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    factors = [(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in names]
    return HeadLoRA(
        states_TR=torch.cat([A(hidden_TH.to(A.weight.dtype)) * scaling for A, _, scaling in factors], dim=1),
        factor_VR=torch.cat([B.weight for _, B, _ in factors], dim=1),
    )


def score_with_lora(
    hidden_TH: Tensor,
    lm_head: nn.Linear,
    low_rank: HeadLoRA,
    targets_T: Tensor,
    logit_scale: LogitScale,
    *,
    with_entropies: bool,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and, where asked for, entropies in nats, of softmax(logits).

    Args:
        lm_head: frozen.
        tile: tokens and words whose logits are there at once.
    """
    weights = (lm_head.weight, lm_head.bias)
    return _LoRAScore.apply(hidden_TH, *low_rank, *weights, targets_T, logit_scale, tile, with_entropies)


class _LoRAScore(torch.autograd.Function):
    """The backward makes each tile of logits anew; the frozen weight has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        states_TR: Tensor,
        factor_VR: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        logit_scale: LogitScale,
        tile: tuple[int, int],
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and, where asked for, entropies, shapes (T,); of the logits nothing but their sums is kept."""
        ctx.set_materialize_grads(False)  # what nobody differentiates costs nothing
        device = hidden_TH.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.product_dtype = torch.get_autocast_dtype(device) if autocast else hidden_TH.dtype
        ctx.sum_dtype = torch.promote_types(ctx.product_dtype, torch.float32)
        ctx.logit_scale, ctx.tile = logit_scale, tile
        inputs = (hidden_TH, states_TR, factor_VR, weight_VH, bias_V)
        # Over the words so far: the largest logit, and the sums of exp(logit - largest) and of logits weighed by that.
        largest_T = hidden_TH.new_full((len(hidden_TH),), -torch.inf, dtype=ctx.sum_dtype)
        sum_T, weighed_T, target_T = (torch.zeros_like(largest_T) for _ in range(3))
        for tokens, words, _, logits in _tiles(ctx, *inputs):
            is_here, places = _places(targets_T[tokens], words)
            target_T[tokens] += torch.where(is_here, logits.gather(1, places).squeeze(1), 0)
            largest = torch.maximum(largest_T[tokens], logits.amax(dim=1))
            shrink = (largest_T[tokens] - largest).exp()
            weights = (logits - largest.unsqueeze(1)).exp_()
            largest_T[tokens] = largest
            sum_T[tokens] = sum_T[tokens] * shrink + weights.sum(dim=1)
            if with_entropies:
                weighed_T[tokens] = weighed_T[tokens] * shrink + weights.mul_(logits).sum(dim=1)
        log_z_T = largest_T + sum_T.log()
        entropies_T = log_z_T - weighed_T / sum_T if with_entropies else None
        ctx.save_for_backward(*inputs, targets_T, log_z_T, entropies_T)
        return target_T - log_z_T, entropies_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_grad_T: Tensor | None, entropy_grad_T: Tensor | None) -> Any:
        """Gradients of hidden states, low-rank states and factor, in the shapes of these."""
        *inputs, targets_T, log_z_T, entropies_T = ctx.saved_tensors
        grads = [
            torch.zeros_like(value, dtype=ctx.sum_dtype) if needed else None
            for value, needed in zip(inputs[:3], ctx.needs_input_grad, strict=False)
        ]
        hidden_grad_TH, states_grad_TR, factor_grad_VR = grads
        for tokens, words, (states, factor, weight), logits in _tiles(ctx, *inputs):
            logps = logits - log_z_T[tokens].unsqueeze(1)
            # d log p_target / d logits_v = [v = target] - p_v        d entropy / d logits_v = -p_v (log p_v + entropy)
            grad = torch.zeros_like(logits)
            if entropy_grad_T is not None:
                grad = (logps + entropies_T[tokens].unsqueeze(1)).mul_(entropy_grad_T[tokens].unsqueeze(1))
            if logp_grad_T is not None:
                grad += logp_grad_T[tokens].unsqueeze(1)
            grad.mul_(logps.exp_()).neg_()
            if logp_grad_T is not None:
                is_here, places = _places(targets_T[tokens], words)
                grad.scatter_add_(1, places, (logp_grad_T[tokens] * is_here).unsqueeze(1))
            grad = grad.mul_(ctx.logit_scale.slope(logits)).to(ctx.product_dtype)
            if hidden_grad_TH is not None:
                _add_product(hidden_grad_TH[tokens], grad, weight)
            if states_grad_TR is not None:
                _add_product(states_grad_TR[tokens], grad, factor)
            if factor_grad_VR is not None:
                _add_product(factor_grad_VR[words], grad.T, states)
        given = (None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=False))
        return *given, None, None, None, None, None, None


def _tiles(
    ctx: Any, hidden_TH: Tensor, states_TR: Tensor, factor_VR: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...], Tensor]]:
    """Of each tile: its tokens, its words, their rows of states, factor and weight, and its logits."""
    dtype = ctx.product_dtype
    for words in _cuts(len(weight_VH), ctx.tile[1]):
        weight, factor = weight_VH[words].to(dtype), factor_VR[words].to(dtype)
        for tokens in _cuts(len(hidden_TH), ctx.tile[0]):
            states = states_TR[tokens].to(dtype)
            projected = (hidden_TH[tokens].to(dtype) @ weight.T).addmm_(states, factor.T)
            if bias_V is not None:
                projected += bias_V[words].to(dtype)
            yield tokens, words, (states, factor, weight), ctx.logit_scale.of_(projected.to(ctx.sum_dtype))


def _cuts(length: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, length)) for start in range(0, length, width)]


def _places(targets_t: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which targets are among these words, shape (t,), and where in them, shape (t, 1); 0 for those that are not."""
    places = targets_t - words.start
    is_here = (places >= 0) & (targets_t < words.stop)
    return is_here, places.where(is_here, 0).unsqueeze(1)


def _add_product(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ += left @ right, where the product is not rounded to the precision of its factors first."""
    if sum_.is_cuda and left.dtype != sum_.dtype:
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_.addmm_(left.to(sum_.dtype), right.to(sum_.dtype))
