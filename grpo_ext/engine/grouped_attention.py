"""Attention of grouped queries under a mask, without copies of keys and values.

In grouped-query attention, n query heads share one head of keys and values. If there is a mask and more than one query
token, transformers' `sdpa` repeats keys and values n times (`repeat_kv`) on CPUs and on CUDA, in the graph of every
layer. That is the case whenever tokens are run on a shared prompt: in packed decoding, and in scoring. Here, PyTorch's
own `enable_gqa` is used on a CPU. On CUDA it would fall back to a slow kernel, so on every device but a CPU the query
heads of a group become further query tokens:

    query (B, kv * n, c, D)  ->  (B, kv, n * c, D), with keys and values as they are, (B, kv, T, D)

Legend: B rows, kv heads of keys and values, n query heads per such head, c query tokens, T keys, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FoldedMasks = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by id of a mask and n: the mask, and the folded one


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Inside, transformers' `sdpa` attention does not repeat keys and values. Other attention is not affected, and
    neither is a function that someone else registered as `sdpa`."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    masks: FoldedMasks = {}  # all layers of a forward have the same mask
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_attention, masks)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


def _attention(
    masks: FoldedMasks,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The result of `sdpa_attention_forward`, up to rounding."""
    n = query.shape[1] // key.shape[1]
    is_plain = not any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    # transformers copies nothing for a single query token, and a mask per head cannot be folded.
    is_grouped = n > 1 and query.shape[2] > 1 and is_plain
    if not is_grouped or attention_mask is None or attention_mask.shape[1:3] != (1, query.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if query.device.type == "cpu":
        output = attend_grouped(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    else:
        if (id(attention_mask), n) not in masks:
            masks[id(attention_mask), n] = attention_mask, attention_mask.repeat(1, 1, n, 1)
        _, folded = masks[id(attention_mask), n]
        output = attend_folded(query, key, value, folded, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Attention of all query heads, shape (B, kv * n, c, D); the kernel reads each key and value head n times.

    Args:
        query: shape (B, kv * n, c, D).
        key, value: shape (B, kv, T, D).
        mask: true or 0 for visible keys, shape (B or 1, 1, c, T).
        options: further arguments of `scaled_dot_product_attention`.
    """
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **options)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """The same, with the n query heads of a group as n times as many query tokens.

    Args:
        mask: the mask n times, shape (B or 1, 1, n * c, T).
    """
    kv_heads, (heads, tokens) = key.shape[1], query.shape[1:3]
    n = heads // kv_heads
    folded = query.unflatten(1, (kv_heads, n)).flatten(2, 3)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, **options)
    return output.unflatten(2, (n, tokens)).flatten(1, 2)
