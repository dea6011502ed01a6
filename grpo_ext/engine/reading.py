"""Run prompts through the backbone, for the states that their siblings go on from.

In: prompts of one length. Out: the cache of all their tokens but the last one, which the rows begin with; or, for a
prompt that is too long for one graph, the caches at the ends of its segments.

Legend: k prompts, S prompt tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_ext.engine.prompt_cache import fork


def segments(tokens: int, chunk_tokens: int | None) -> list[range]:
    """Ranges of at most `chunk_tokens` prompt tokens, of two at least, but for a prompt that has no more than one."""
    if chunk_tokens is None or tokens <= chunk_tokens:
        return [range(tokens)] if tokens else []
    ends = list(range(max(2, chunk_tokens), tokens - 1, max(2, chunk_tokens)))
    return [range(start, end) for start, end in zip([0, *ends], [*ends, tokens], strict=True)]


def read(lm: PreTrainedModel, prompts_kS: Tensor, **options: Any) -> DynamicCache | None:
    """The cache of all tokens but the last one; None for prompts of one token."""
    whole = segments(prompts_kS.size(1) - 1, None)
    return read_segment(lm, prompts_kS, whole[0], None, **options) if whole else None


def read_in_segments(
    lm: PreTrainedModel, prompts_kS: Tensor, chunk_tokens: int | None, **options: Any
) -> Iterator[DynamicCache]:
    """The caches at the end of each segment, each of them left as it was by the next."""
    cache = None
    for segment in segments(prompts_kS.size(1) - 1, chunk_tokens):
        before = None if cache is None else fork(cache, range(len(prompts_kS)))
        cache = read_segment(lm, prompts_kS, segment, before, **options)
        yield cache


def read_segment(
    lm: PreTrainedModel, prompts_kS: Tensor, segment: range, cache: DynamicCache | None, **options: Any
) -> DynamicCache:
    """The cache at the end of a segment; `cache`, the one at its beginning, is written to."""
    return lm.base_model(
        input_ids=prompts_kS[:, segment.start : segment.stop],
        past_key_values=cache,
        position_ids=torch.arange(segment.start, segment.stop, device=prompts_kS.device).unsqueeze(0),
        use_cache=True,
        **options,
    ).past_key_values
