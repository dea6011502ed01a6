"""The LM head of a causal language model, in tiles: hidden states in, log-probs, entropies and an exact KL out, without
the logits of the whole vocabulary.

In: hidden states of the tokens to score, flattened to one dimension, and their targets. Out: one number per token,
float32. The tiles are TRL's kernels (Triton on a GPU).

TRL's kernels take a single weight. With LoRA on the head, `score_with_lora` adds the adapter's share to the logits of
each tile instead of to the weight, so the head stays frozen, even if its weight is tied to the embedding:

    logits[:, tile] = h W[tile]^T + u B[tile]^T        u = s h A^T, a few numbers per token

On this path, products have the precision of the hidden states or of autocast. Sums over the vocabulary and gradients
are in float32, or in float64 for float64 hidden states.

Legend: T tokens, V vocabulary, H hidden size, R rank (summed over the active adapters).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from grpo_ext.model.unwrap import head_of

VOCAB_TILE = 32768  # as in TRL
KL_TOKEN_TILE = 512  # tokens per tile of the exact KL, which keeps two tiles in float32
LORA_TILE = (1024, 32768)  # tokens x vocabulary; TRL's tile has four times the tokens, but makes no float32 copies


def logit_multiplier(config: PreTrainedConfig) -> float:
    """The factor by which a model with this text config multiplies its logits before their softcap.

    Its name depends on the model family: `logit_scale` (Cohere), `output_multiplier` (Muse Glimmer),
    `lm_head_multiplier` (Falcon-H1), or `logits_scaling` (a divisor in Granite and MiniCPM3, a factor in HyperCLOVA X).
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scale = getattr(config, "logits_scaling", None)
    if scale is None:
        return 1.0
    return scale if config.model_type == "hyperclovax" else 1 / scale


@dataclass(frozen=True, kw_only=True)
class TiledHead:
    """The LM head of `lm`: scores hidden states.

    Attributes:
        softcap: bound on the logits (`final_logit_softcapping`); None for no bound.
        scale: factor on the logits, before the softcap.
    """

    lm: PreTrainedModel
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, lm: PreTrainedModel) -> "TiledHead":
        """The head of a model, with the softcap and scale of its config (TRL 1.16, `add_fused_lm_head`)."""
        config = lm.config.get_text_config()
        return cls(lm=lm, softcap=getattr(config, "final_logit_softcapping", None), scale=logit_multiplier(config))

    def score(
        self, hidden_TH: Tensor, targets_T: Tensor, temperature: float, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets and, if requested, entropies, of softmax(logits / temperature); in nats."""
        lm_head = self.lm.get_output_embeddings()
        outputs = ("log_probs", "entropy") if with_entropies else ("log_probs",)
        tile = min(VOCAB_TILE, lm_head.weight.size(0))
        hidden_TH = hidden_TH.to(lm_head.weight.device)
        lora = active_head_lora(self.lm, hidden_TH)
        if lora is not None:
            logit_scale = LogitScale(temperature=temperature, softcap=self.softcap, scale=self.scale)
            return score_with_lora(hidden_TH, lm_head, lora, targets_T, logit_scale, with_entropies=with_entropies)
        logps_T, entropies_T, *_ = ChunkedLogProbFunction.apply(
            hidden_TH, lm_head.weight, lm_head.bias, targets_T, temperature, tile, self.softcap, self.scale, outputs
        )
        return logps_T, entropies_T

    def exact_kl(self, hidden_TH: Tensor, ref_hidden_TH: Tensor, temperature: float) -> Tensor:
        """KL(policy || reference) of each token over the whole vocabulary, in nats, with the policy's gradient.

        Args:
            hidden_TH: hidden states of the policy.
            ref_hidden_TH: hidden states of the reference, which uses the same frozen head.
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


# The LM head with LoRA


class HeadLoRA(NamedTuple):
    """What the adapters add to the logits: `states_TR @ factor_VR.T`, differentiable in hidden states, A and B."""

    states_TR: Tensor
    factor_VR: Tensor


class LogitScale(NamedTuple):
    """From a projection x to logits: softcap * tanh(scale * x / softcap) / temperature, or scale * x / temperature if
    there is no softcap."""

    temperature: float
    softcap: float | None
    scale: float

    def apply_(self, projected: Tensor) -> Tensor:
        """Turn projections into logits, in place."""
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
    """The active adapters of the LM head; None if there is none, or inside `disable_adapter()`."""
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
    lora: HeadLoRA,
    targets_T: Tensor,
    logit_scale: LogitScale,
    *,
    with_entropies: bool,
    tile: tuple[int, int] = LORA_TILE,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and, if requested, entropies, of softmax(logits); in nats.

    Args:
        lm_head: the frozen layer below the adapters.
        tile: tokens and vocabulary entries per tile of logits.
    """
    weights = (lm_head.weight, lm_head.bias)
    return _LoRAScore.apply(hidden_TH, *lora, *weights, targets_T, logit_scale, tile, with_entropies)


class _LoRAScore(torch.autograd.Function):
    """The backward recomputes each tile of logits; the frozen weight has no gradient."""

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
        """Log-probs and, if requested, entropies, shapes (T,); only sums over the logits are kept."""
        ctx.set_materialize_grads(False)  # an output that is not differentiated costs nothing
        device = hidden_TH.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.product_dtype = torch.get_autocast_dtype(device) if autocast else hidden_TH.dtype
        ctx.sum_dtype = torch.promote_types(ctx.product_dtype, torch.float32)
        ctx.logit_scale, ctx.tile = logit_scale, tile
        inputs = (hidden_TH, states_TR, factor_VR, weight_VH, bias_V)
        # Online softmax: the largest logit so far, the sum of the weights exp(logit - largest), and the weighted sum of
        # logits.
        largest_T = hidden_TH.new_full((len(hidden_TH),), -torch.inf, dtype=ctx.sum_dtype)
        sum_T, weighted_T, target_T = (torch.zeros_like(largest_T) for _ in range(3))
        for tokens, vocab, _, logits in _tiles(ctx, *inputs):
            is_here, indices = _local_targets(targets_T[tokens], vocab)
            target_T[tokens] += torch.where(is_here, logits.gather(1, indices).squeeze(1), 0)
            largest = torch.maximum(largest_T[tokens], logits.amax(dim=1))
            shrink = (largest_T[tokens] - largest).exp()
            weights = (logits - largest.unsqueeze(1)).exp_()
            largest_T[tokens] = largest
            sum_T[tokens] = sum_T[tokens] * shrink + weights.sum(dim=1)
            if with_entropies:
                weighted_T[tokens] = weighted_T[tokens] * shrink + weights.mul_(logits).sum(dim=1)
        log_z_T = largest_T + sum_T.log()
        entropies_T = log_z_T - weighted_T / sum_T if with_entropies else None
        ctx.save_for_backward(*inputs, targets_T, log_z_T, entropies_T)
        return target_T - log_z_T, entropies_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_grad_T: Tensor | None, entropy_grad_T: Tensor | None) -> Any:
        """Gradients of hidden states, LoRA states and LoRA factor."""
        *inputs, targets_T, log_z_T, entropies_T = ctx.saved_tensors
        grads = [
            torch.zeros_like(value, dtype=ctx.sum_dtype) if needed else None
            for value, needed in zip(inputs[:3], ctx.needs_input_grad, strict=False)
        ]
        hidden_grad_TH, states_grad_TR, factor_grad_VR = grads
        for tokens, vocab, (states, factor, weight), logits in _tiles(ctx, *inputs):
            logps = logits - log_z_T[tokens].unsqueeze(1)
            # d log p_target / d logits_v = [v = target] - p_v        d entropy / d logits_v = -p_v (log p_v + entropy)
            grad = torch.zeros_like(logits)
            if entropy_grad_T is not None:
                grad = (logps + entropies_T[tokens].unsqueeze(1)).mul_(entropy_grad_T[tokens].unsqueeze(1))
            if logp_grad_T is not None:
                grad += logp_grad_T[tokens].unsqueeze(1)
            grad.mul_(logps.exp_()).neg_()
            if logp_grad_T is not None:
                is_here, indices = _local_targets(targets_T[tokens], vocab)
                grad.scatter_add_(1, indices, (logp_grad_T[tokens] * is_here).unsqueeze(1))
            grad = grad.mul_(ctx.logit_scale.slope(logits)).to(ctx.product_dtype)
            if hidden_grad_TH is not None:
                _add_product(hidden_grad_TH[tokens], grad, weight)
            if states_grad_TR is not None:
                _add_product(states_grad_TR[tokens], grad, factor)
            if factor_grad_VR is not None:
                _add_product(factor_grad_VR[vocab], grad.T, states)
        input_grads = (
            None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=False)
        )
        return *input_grads, None, None, None, None, None, None


def _tiles(
    ctx: Any, hidden_TH: Tensor, states_TR: Tensor, factor_VR: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...], Tensor]]:
    """For each tile: its slices of tokens and vocabulary, its rows of (states, factor, weight), and its logits."""
    dtype = ctx.product_dtype
    for vocab in _slices(len(weight_VH), ctx.tile[1]):
        weight, factor = weight_VH[vocab].to(dtype), factor_VR[vocab].to(dtype)
        for tokens in _slices(len(hidden_TH), ctx.tile[0]):
            states = states_TR[tokens].to(dtype)
            projected = (hidden_TH[tokens].to(dtype) @ weight.T).addmm_(states, factor.T)
            if bias_V is not None:
                projected += bias_V[vocab].to(dtype)
            yield tokens, vocab, (states, factor, weight), ctx.logit_scale.apply_(projected.to(ctx.sum_dtype))


def _slices(length: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, length)) for start in range(0, length, width)]


def _local_targets(targets_t: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in this vocabulary slice, shape (t,), and its index in the slice, else 0, shape (t, 1)."""
    indices = targets_t - vocab.start
    is_here = (indices >= 0) & (targets_t < vocab.stop)
    return is_here, indices.where(is_here, 0).unsqueeze(1)


def _add_product(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ += left @ right, without rounding the product to the precision of its factors."""
    if sum_.is_cuda and left.dtype != sum_.dtype:
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_.addmm_(left.to(sum_.dtype), right.to(sum_.dtype))
