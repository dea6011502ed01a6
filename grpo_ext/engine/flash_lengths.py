"""Lengths for flash attention, which it would otherwise read from the device.

For a forward of one row, transformers checks in every layer whether the row holds several packed sequences, and the
host waits each time. The lengths are known here: one sequence of all query tokens, on all cached tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def flash_lengths(lm: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache | None) -> dict[str, Any]:
    """Keyword arguments for a forward of these ids without padding; none if they would have no use.

    Args:
        cache: all tokens before them; None if there are none.
    """
    config = lm.config.get_text_config()
    rows, tokens = ids_BT.shape
    # Recurrent layers read the same arguments, and layers with a sliding window cache only a part of the tokens.
    only_full_attention = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    is_plain = cache is None or all(type(layer) is DynamicLayer for layer in cache.layers)
    if rows != 1 or "flash" not in (config._attn_implementation or "") or not (only_full_attention and is_plain):
        return {}
    keys = tokens if cache is None else cache.get_seq_length() + tokens
    ends = torch.arange(2, dtype=torch.int32, device=ids_BT.device)  # of no sequence, and of one
    return {
        "cu_seq_lens_q": ends * tokens,
        "cu_seq_lens_k": ends * keys,
        "max_length_q": tokens,
        "max_length_k": keys,
    }
