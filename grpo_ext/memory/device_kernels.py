"""Emulate, on the meta device, what makes the memory use of a CPU and a GPU differ: the attention kernel, the precision
of matrix products under autocast, and the workspace of the LM head.

    kernels = DeviceKernels("cuda", torch.bfloat16)
    with MemoryCounter() as counter, kernels.emulated():
        model(...)

The CPU part runs the same operations as a CPU. The GPU part follows the sources of TRL and PyTorch and has not been
compared with a GPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from grpo_ext.engine.lm_head import VOCAB_TILE, TiledHead
from grpo_ext.memory.counter import MemoryCounter

aten = torch.ops.aten
MASK_ALIGNMENT = 16  # CUDA attention pads the mask to a multiple of this many keys


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """One call of the LM head, or its backward, on `tokens` hidden states."""

    tokens: int
    with_entropies: bool
    backward: bool


@dataclass(frozen=True)
class DeviceKernels:
    """The kernels of one kind of device.

    Args:
        device_type: "cuda" or "cpu".
        autocast: dtype of matrix products; None for the dtype of their inputs.
    """

    device_type: str
    autocast: torch.dtype | None

    @contextmanager
    def emulated(self) -> Iterator[None]:
        """A context in which operations on meta tensors are dispatched as on this device."""
        with _EmulatedFunctions(self), _PackedFactors() if self.device_type == "cpu" else nullcontext():
            yield

    def head_workspace(self, lm: PreTrainedModel, call: HeadCall) -> int:
        """Peak bytes of a call of the LM head, excluding its inputs and outputs."""
        head: Any = lm.get_output_embeddings()
        vocabulary, hidden = head.weight.shape
        dtype = self.autocast or head.weight.dtype
        if self.device_type == "cpu":
            softcap = getattr(lm.config, "final_logit_softcapping", None)
            return _head_workspace_on_cpu(call, vocabulary, hidden, dtype, softcap)
        # One tile of logits, which the Triton kernels turn into gradients in place, and float32 input gradients.
        tile = min(call.tokens, TOKEN_CHUNK_SIZE) * min(vocabulary, VOCAB_TILE) * dtype.itemsize
        return tile + call.backward * call.tokens * hidden * torch.float32.itemsize


class _HeadOnly(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@functools.lru_cache(maxsize=256)
def _head_workspace_on_cpu(
    call: HeadCall, vocabulary: int, hidden: int, dtype: torch.dtype, softcap: float | None
) -> int:
    """Counted by running the engine's own head on tensors without data."""
    with FakeTensorMode():
        lm: Any = _HeadOnly(vocabulary, hidden, dtype)
        hidden_TH = torch.empty(call.tokens, hidden, dtype=dtype, requires_grad=call.backward)
        targets_T = torch.zeros(call.tokens, dtype=torch.long)
        head = TiledHead(lm=lm, softcap=softcap, scale=1.0)
        if not call.backward:
            with MemoryCounter() as counter, torch.no_grad():
                head.score(hidden_TH, targets_T, 1.0, with_entropies=call.with_entropies)
            return counter.peak
        scored = head.score(hidden_TH, targets_T, 1.0, with_entropies=call.with_entropies)
        outputs = [output for output in scored if output is not None]
        with MemoryCounter() as counter:
            torch.autograd.grad(outputs, hidden_TH, [torch.empty_like(output) for output in outputs])
        return counter.peak


class _PackedFactors(TorchDispatchMode):
    """oneDNN copies the second factor of a batched 16-bit product, which at the LM head is the whole head. PyTorch uses
    oneDNN only on CPUs that have instructions for such products (AVX512), and only for these dtypes."""

    def __init__(self) -> None:
        super().__init__()
        is_supported = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        has_onednn = torch.backends.mkldnn.is_available()
        self._copied = [dtype for dtype, has_products in is_supported.items() if has_onednn and has_products()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copied = None
        if func is aten.bmm.default and args[1].dtype in self._copied:
            copied = args[1].new_empty(args[1].shape)
        output = func(*args, **(kwargs or {}))
        del copied
        return output


class _EmulatedFunctions(TorchFunctionMode):
    def __init__(self, kernels: DeviceKernels):
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.linear and self._kernels.autocast is not None:
            args = [value.to(self._kernels.autocast) if isinstance(value, Tensor) else value for value in args]
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel that the device would choose. Its memory is linear, not quadratic, in the number of tokens."""
        options = {"is_causal": is_causal, "scale": scale}
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.device)
        if self._kernels.device_type == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask, **options)[
                0
            ]
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
        missing = -attn_mask.shape[-1] % MASK_ALIGNMENT
        if missing:
            attn_mask = F.pad(attn_mask, (0, missing))[..., : attn_mask.shape[-1]]
        shape = (*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask.expand(shape), compute_log_sumexp=True, **options
        )[0]
