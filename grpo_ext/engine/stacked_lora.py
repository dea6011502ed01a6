"""LoRA with fewer kernels per layer, for as long as the adapter does not change: while completions are sampled.

In: a model with PEFT's LoRA layers. Out: the same layers, whose forward equals PEFT's up to rounding. The adapter is
never merged into the base.

    PEFT    y_q = W_q x,  y_q + s B_q (A_q x)                   for each of q, k, v
    here    [u_q u_k u_v] = [A_q A_k A_v] x                     once for all layers that read x
            y_q = W_q x,  y_q += (s B_q) u_q                    a single kernel (addmm); s B_q is computed once

Which layers read the same tensor is observed, not configured: a layer that is given the same tensor object as the one
before it joins that layer's product from the next forward on.

Legend: N tokens, K inputs, M outputs, r rank, R rank summed over the layers that read the same tensor.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from bitsandbytes import nn as bnb
from peft.tuners.lora import Linear, Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# LoRA layers, by the frozen layers below them. The output of these is a new tensor, which may be modified.
STACKABLE_LAYERS: dict[type, tuple[type, ...]] = {
    Linear: (nn.Linear, Conv1D),
    Linear4bit: (bnb.Linear4bit,),
    Linear8bitLt: (bnb.Linear8bitLt,),
}


@contextmanager
def stacked_lora(model: nn.Module) -> Iterator[None]:
    """A context in which plain LoRA layers of `model` run with fewer kernels; all others run PEFT's forward.

    Inside, gradients are off, and neither adapters nor base may change. An adapter may be disabled or switched: such
    layers run PEFT's forward again. Copies of the adapters are held, in the dtype of their products.
    """
    assert not torch.is_grad_enabled(), "products with copies of the adapters have no gradients"
    last_input = _LastInput()
    forwards = [_StackedForward(module, last_input) for module in model.modules() if is_stackable(module)]
    try:
        for forward in forwards:
            forward.layer.forward = forward
        yield
    finally:
        # All of these refer to each other, so that copies would stay until the next garbage collection.
        last_input.release()
        for forward in forwards:
            vars(forward.layer).pop("forward", None)
            forward.release()


def is_stackable(layer: Any) -> bool:
    """Whether this is a LoRA layer with one active adapter, W x + s B A x, and nothing else that PEFT or a user has
    added: dropout, DoRA, biases, merged weights, hooks on its parts, or another forward."""
    if type(layer) not in STACKABLE_LAYERS or type(layer.base_layer) not in STACKABLE_LAYERS[type(layer)]:
        return False
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not layer.cast_input_dtype_enabled or len(adapters) != 1:
        return False
    adapter = adapters[0]
    A, B, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    is_plain = adapter not in layer.lora_variant and type(A) is type(B) is nn.Linear and A.bias is B.bias is None
    is_deterministic = isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not dropout.training)
    return is_plain and is_deterministic and "forward" not in vars(layer) and not any(map(_is_hooked, layer.children()))


def _is_hooked(part: nn.Module) -> bool:
    """Whether a user has added hooks to a module or to one in it, or replaced its forward, as accelerate does."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in part.modules()
    )


class _Stack(NamedTuple):
    """The A matrices of layers that read the same tensor, and the first row of each layer."""

    A_RK: Tensor
    starts: dict["_StackedForward", int]


class _StackedForward:
    """The forward of one LoRA layer."""

    def __init__(self, layer: Any, last_input: "_LastInput"):
        self.layer, self._base, self._last_input = layer, layer.base_layer, last_input
        self._active_adapter = layer.active_adapter
        adapter = next(name for name in layer.active_adapters if name in layer.lora_A)
        self._A, self._B, self._scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
        self.rank: int = self._A.out_features
        self._readers = [self]
        self._stacks: dict[torch.dtype, _Stack] = {}
        self._scaled_Bs: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        is_changed = layer.disable_adapters or layer.merged or layer.active_adapter != self._active_adapter
        if is_changed or args or kwargs:
            return type(layer).forward(layer, x, *args, **kwargs)
        result = self._base(x)
        result_NM = result.reshape(-1, result.size(-1))
        products_Nr = self._last_input.multiply(self, x, self._product_dtype(x))
        B_rM = self._scaled_B(products_Nr.dtype)
        if result.dtype == B_rM.dtype:
            return result_NM.addmm_(products_Nr, B_rM).view(result.shape)
        total = (result_NM + products_Nr @ B_rM).view(result.shape)
        # As in PEFT, whose quantised layers return the common dtype under the autocast of CUDA.
        keeps_common = not isinstance(layer, Linear) and torch.is_autocast_enabled()
        return total if keeps_common else total.to(result.dtype)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of PEFT's product A x: that of autocast, which leaves float64 alone, or that of the adapter."""
        own, device = self._A.weight.dtype, x.device.type
        if own == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
            return own
        return torch.get_autocast_dtype(device)

    def multiply_alone(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A x, shape (N, r)."""
        return _multiply(x, self._A.weight.to(dtype))

    def add_reader(self, other: "_StackedForward") -> None:
        """Add a layer that reads the same tensor as this one."""
        if other not in self._readers:
            self._readers.append(other)
            # At once: what a CUDA graph computes while it is captured has no values until the graph is replayed.
            self._stacks = {dtype: self._make_stack(dtype) for dtype in self._stacks}

    def stack(self, dtype: torch.dtype) -> _Stack:
        """The A matrices of this layer and of all that are known to read the same tensor."""
        if dtype not in self._stacks:
            self._stacks[dtype] = self._make_stack(dtype)
        return self._stacks[dtype]

    def _make_stack(self, dtype: torch.dtype) -> _Stack:
        ends = itertools.accumulate(reader.rank for reader in self._readers)
        starts = dict(zip(self._readers, [0, *ends], strict=False))
        return _Stack(torch.cat([reader._A.weight.to(dtype) for reader in self._readers]), starts)

    def release(self) -> None:
        """Drop all copies."""
        self._stacks, self._scaled_Bs = {}, {}

    def _scaled_B(self, dtype: torch.dtype) -> Tensor:
        """s B, shape (r, M)."""
        if dtype not in self._scaled_Bs:
            self._scaled_Bs[dtype] = (self._B.weight * self._scaling).to(dtype).T
        return self._scaled_Bs[dtype]


class _LastInput:
    """The tensor that the last layer has read, and its product with the A matrices of all layers known to read it."""

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        self._x: Tensor | None = None
        self._key: tuple[int, torch.dtype] | None = None
        self._first: _StackedForward | None = None
        self._starts: dict[_StackedForward, int] = {}
        self._products_NR: Tensor | None = None

    def multiply(self, layer: _StackedForward, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A x of this layer, shape (N, r)."""
        key = (0 if x.is_inference() else x._version, dtype)  # the same object may have been modified in place
        if x is not self._x or key != self._key:
            stack = layer.stack(dtype)
            self._x, self._key, self._first, self._starts = x, key, layer, stack.starts
            self._products_NR = _multiply(x, stack.A_RK)
        assert self._first is not None
        assert self._products_NR is not None
        start = self._starts.get(layer)
        if start is None:
            self._first.add_reader(layer)
            return layer.multiply_alone(x, dtype)
        return self._products_NR.narrow(1, start, layer.rank)


def _multiply(x: Tensor, A_RK: Tensor) -> Tensor:
    """A x for each token, shape (N, R)."""
    return F.linear(x.reshape(-1, x.size(-1)).to(A_RK.dtype), A_RK)
