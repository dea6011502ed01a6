"""4-bit layers on a CPU, dequantised once per rollout instead of once per token.

In: a model with bitsandbytes' 4-bit layers. Out: the same layers, whose outputs have the same bits.

The CPU kernel of bitsandbytes dequantises the weight of a layer and multiplies. While completions are sampled, each
layer runs once per token with the same weight, so the dequantised one is kept if memory allows. On CUDA, a fused kernel
reads the packed weight if the batch is small: layers there are left alone.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from torch import Tensor, nn
from torch.nn import functional as F

from grpo_ext.machine import GIB, free_memory_per_process

logger = logging.getLogger(__name__)

# The other part is left to the KV cache and the logits of the rollout.
USABLE_FRACTION = 0.5


class WeightUnpacker:
    """Keeps dequantised weights for the length of a context, if they take at most half of the free memory.

    Args:
        free_memory: bytes that this process can still take.
    """

    def __init__(self, free_memory: Callable[[], float] = free_memory_per_process):
        self._free_memory = free_memory
        self._is_reported = False

    @contextmanager
    def unpacked(self, model: nn.Module) -> Iterator[None]:
        """A context in which gradients are off and the base of `model` may not change."""
        assert not torch.is_grad_enabled(), "dequantised weights are copies, which pass no gradients on"
        forwards = [_UnpackedForward(layer) for layer in model.modules() if _can_unpack(layer)]
        if not forwards:
            yield
            return
        size, free = sum(forward.nbytes for forward in forwards), self._free_memory()
        fits = size <= USABLE_FRACTION * free
        if not self._is_reported:
            self._is_reported = True
            logger.info(
                "4-bit weights are %s for each token while completions are sampled: dequantised, they take %.2f GB, "
                "and %.2f GB are free.",
                "dequantised once per rollout instead of once" if fits else "dequantised",
                size / GIB,
                free / GIB,
            )
        if not fits:
            forwards = []
        try:
            for forward in forwards:
                forward.layer.forward = forward
            yield
        finally:
            for forward in forwards:
                vars(forward.layer).pop("forward", None)


def _can_unpack(layer: Any) -> bool:
    """Whether the kernel of this 4-bit layer dequantises its whole weight, and nobody has replaced its forward."""
    return (
        type(layer) in (Linear4bit, LinearNF4, LinearFP4)
        and layer.weight.device.type == "cpu"
        and not layer.support_avx512bf16_for_cpu  # a fused kernel
        and layer.weight.quant_state is not None
        and tuple(layer.weight.quant_state.shape) == (layer.out_features, layer.in_features)
        and "forward" not in vars(layer)
    )


class _UnpackedForward:
    """The forward of one layer."""

    def __init__(self, layer: Any):
        self.layer = layer
        self._weight: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the dequantised weight."""
        dtype = self.layer.compute_dtype or self.layer.weight.quant_state.dtype
        return self.layer.out_features * self.layer.in_features * _product_dtype(dtype).itemsize

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.compute_type_is_set:  # this layer has never run
            return type(layer).forward(layer, x)
        input_dtype = x.dtype
        if layer.compute_dtype is not None:
            x = x.to(layer.compute_dtype)
        dtype = _product_dtype(x.dtype)
        if self._weight is None or self._weight.dtype != dtype:
            self._weight = dequantise(layer.weight, layer.weight.quant_state, x.dtype).to(dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, self._weight, bias).to(input_dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix product of this dtype runs on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


def dequantise(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight that bitsandbytes multiplies with on a CPU (`_gemm_4bit_default_impl`), shape (outputs, inputs)."""
    ops, absmax = torch.ops.bitsandbytes, state.absmax
    if state.nested:
        blocks = state.state2
        scales = ops.dequantize_blockwise.default(absmax, blocks.absmax, blocks.code, blocks.blocksize, torch.float32)
        absmax = scales + state.offset
    return ops.dequantize_4bit.default(
        packed.view(-1, 1), absmax, state.blocksize, state.quant_type, state.shape, dtype
    )
