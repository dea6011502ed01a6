"""What differs between a CPU and a GPU below the engine, for a rehearsal on the meta device: attention, the precision
of multiplications under autocast, and the tile of the LM head.

The CPU's side is the code that runs there. The GPU's side is written down from TRL's and PyTorch's sources, and was
checked on no GPU.
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
from grpo_ext.memory.counter import Tally

aten = torch.ops.aten
MASK_ALIGNMENT = 16  # keys; CUDA's attention pads the mask to a multiple


@dataclass(frozen=True, kw_only=True)
class HeadPass:
    """The LM head at work on so many tokens at once."""

    tokens: int
    with_entropies: bool
    backward: bool


@dataclass(frozen=True)
class Kernels:
    """Of one device.

    Args:
        device_type: "cuda" or "cpu".
        autocast: the precision of multiplications; None for that of their inputs.
    """

    device_type: str
    autocast: torch.dtype | None

    @contextmanager
    def functions(self) -> Iterator[None]:
        """Inside, PyTorch's functions take the way on meta tensors that they take on the device's."""
        with _Functions(self), _PackedProducts() if self.device_type == "cpu" else nullcontext():
            yield

    def tile(self, lm: PreTrainedModel, passed: HeadPass) -> int:
        """Bytes that the LM head takes for a moment, beside its inputs and outputs."""
        head: Any = lm.get_output_embeddings()
        words, hidden = head.weight.shape
        dtype = self.autocast or head.weight.dtype
        if self.device_type == "cpu":
            softcap = getattr(lm.config, "final_logit_softcapping", None)
            return _tile_of_cpu(passed, words, hidden, dtype, softcap)
        # One buffer of products, which Triton's kernels turn into gradients in place, and gradients in float32.
        tile = min(passed.tokens, TOKEN_CHUNK_SIZE) * min(words, VOCAB_TILE) * dtype.itemsize
        return tile + passed.backward * passed.tokens * hidden * torch.float32.itemsize


class _HeadOnly(nn.Module):
    def __init__(self, words: int, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.head = nn.Linear(hidden, words, bias=False, dtype=dtype)
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@functools.lru_cache(maxsize=256)
def _tile_of_cpu(passed: HeadPass, words: int, hidden: int, dtype: torch.dtype, softcap: float | None) -> int:
    """Counted on the head itself, run on tensors without data."""
    with FakeTensorMode():
        lm: Any = _HeadOnly(words, hidden, dtype)
        hidden_TH = torch.empty(passed.tokens, hidden, dtype=dtype, requires_grad=passed.backward)
        targets_T = torch.zeros(passed.tokens, dtype=torch.long)
        head = TiledHead(lm=lm, softcap=softcap, scale=1.0)
        if not passed.backward:
            with Tally() as tally, torch.no_grad():
                head.score(hidden_TH, targets_T, 1.0, with_entropies=passed.with_entropies)
            return tally.peak
        scored = head.score(hidden_TH, targets_T, 1.0, with_entropies=passed.with_entropies)
        outputs = [output for output in scored if output is not None]
        with Tally() as tally:
            torch.autograd.grad(outputs, hidden_TH, [torch.empty_like(output) for output in outputs])
        return tally.peak


class _PackedProducts(TorchDispatchMode):
    """A CPU copies the second factor of a batch of products in 16 bits: the whole LM head, where a prompt was read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copied = None
        if func is aten.bmm.default and args[1].dtype in (torch.bfloat16, torch.float16):
            copied = args[1].new_empty(args[1].shape)
        output = func(*args, **(kwargs or {}))
        del copied
        return output


class _Functions(TorchFunctionMode):
    def __init__(self, kernels: Kernels):
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
        """The kernel that the device would choose; its memory does not grow with the square of the tokens."""
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
