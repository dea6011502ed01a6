"""Prefill: prompts in, caches out from which all siblings can continue.

    prompt[:-1] --(one forward)--> DynamicCache --fork--> one cache for n siblings

The first half lists, replaces and forks the states of a cache (keys, values, convolution, recurrent). States are plain
tensors, so a fork with gradients is `with_states(cache, [leaf[rows] ...])`. Nothing here depends on the attention
backend: it only relies on the layers of transformers' own `DynamicCache`.

The second half runs the forwards. Scoring prefills all tokens except the last one, which begins each row (`prefill`, or
`prefill_in_segments` if the prompt is too long for one graph). Sampling prefills whole prompts and needs the logits
that follow them (`prefill_prompts`).

Legend: k prompts of a forward, P distinct prompts, S tokens to prefill, T tokens in the cache, V vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from grpo_ext.engine.flash_lengths import flash_lengths
from grpo_ext.engine.grouped_attention import grouped_attention

Prompt = tuple[int, ...]  # token ids without padding

# Layers that keep all their states in `keys`, `values`, `conv_states` and `recurrent_states`, batch dimension first.
FORKABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class _OutOfPlace(LinearAttentionLayer):
    """Replaces its states, whereas transformers writes into them: autograd forbids in-place writes to a state that a
    graph has used."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.has_previous_state[state_idx]:
            return super().update_conv_state(conv_states, state_idx, **kwargs)
        full_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.conv_states[state_idx] = full_states[..., -self.conv_kernel_size[state_idx] :]
        return full_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _OutOfPlaceWithAttention(_OutOfPlace, LinearAttentionAndFullAttentionLayer):
    pass


class _OutOfPlaceWithSlidingAttention(_OutOfPlace, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


_OUT_OF_PLACE = {
    LinearAttentionLayer: _OutOfPlace,
    LinearAttentionAndFullAttentionLayer: _OutOfPlaceWithAttention,
    LinearAttentionAndSlidingWindowAttentionLayer: _OutOfPlaceWithSlidingAttention,
}
_STATE_DICTS = ("conv_states", "recurrent_states")
_DICTS_OF_LINEAR_LAYERS = (
    *_STATE_DICTS,
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)

# States of a cache


def why_unforkable(cache: Any) -> str | None:
    """The reason why this cache cannot be forked exactly, as text for a log; None if it can."""
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    other = next((layer for layer in cache.layers if type(layer) not in FORKABLE_LAYERS), None)
    return None if other is None else f"its cache has layers of type {type(other).__name__}"


def cache_states(cache: DynamicCache) -> list[Tensor]:
    """Every state tensor of the cache, layer by layer, in a fixed order; batch dimension first."""
    states = []
    for layer in cache.layers:
        if _has_keys(layer):
            states += [layer.keys, layer.values]
        for name in _STATE_DICTS:
            states += [state for state in getattr(layer, name, {}).values() if state is not None]
    return states


def with_states(cache: DynamicCache, states: Sequence[Tensor]) -> DynamicCache:
    """A copy of `cache` that holds `states`, in the order of `cache_states`; `cache` itself does not change."""
    remaining = iter(states)
    new = copy.copy(cache)
    new.layers = []
    for layer in cache.layers:
        layer = copy.copy(layer)
        if _has_keys(layer):
            layer.keys, layer.values = next(remaining), next(remaining)
        if isinstance(layer, LinearAttentionLayer):
            layer.__class__ = _OUT_OF_PLACE.get(type(layer), type(layer))
            for name in _DICTS_OF_LINEAR_LAYERS:
                setattr(layer, name, dict(getattr(layer, name)))
            for name in _STATE_DICTS:
                slots = getattr(layer, name)
                slots |= {index: next(remaining) for index, state in slots.items() if state is not None}
        new.layers.append(layer)
    assert next(remaining, None) is None, "more states than the cache has room for"
    return new


def fork(cache: DynamicCache, rows: Sequence[int] | Tensor) -> DynamicCache:
    """A cache whose row i continues from row `rows[i]` of `cache`; gradients of the copies add up in that row.

    The states are copied, because some layers write into their states in place.
    """
    states = cache_states(cache)
    index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), device=states[0].device)
    return with_states(cache, [state.index_select(0, index) for state in states])


def join_caches(caches: Sequence[DynamicCache], rows: Tensor) -> DynamicCache:
    """One cache whose row i continues from row `rows[i]` of the concatenated `caches`.

    Keys and values of shorter prompts are padded on the left. The caller must mask the padding in attention.
    """
    longest = max(caches, key=lambda cache: cache.get_seq_length())
    joined = []
    for parts in zip(*map(cache_states, [longest, *caches]), strict=True):
        tokens = parts[0].shape[-2]  # states without a token dimension have equal shapes
        joined.append(torch.cat([pad(part, (0, 0, tokens - part.shape[-2], 0)) for part in parts[1:]])[rows])
    return with_states(longest, joined)


def extract_cache_row(cache: DynamicCache, row: int, is_own_T: Tensor) -> DynamicCache:
    """A cache with one row of `cache`, restricted to some of its T tokens.

    Args:
        is_own_T: which tokens to keep, shape (T,). Within sliding windows they must be contiguous.
    """
    extracted = fork(cache, [row])
    own_of: dict[int, Tensor] = {}  # number of cached tokens of a layer -> indices of those to keep
    for layer in extracted.layers:
        if _has_keys(layer):
            tokens = layer.keys.shape[-2]
            if tokens not in own_of:
                own_of[tokens] = is_own_T[len(is_own_T) - tokens :].nonzero().flatten()
            layer.keys, layer.values = (states[..., own_of[tokens], :] for states in (layer.keys, layer.values))
            if layer.is_sliding:
                layer.cumulative_length = int(is_own_T.sum())
    return extracted


def share_prefix_storage(boundary: DynamicCache, last: DynamicCache) -> DynamicCache:
    """`boundary` with its keys and values replaced by views into those of `last`, which begin with the same tokens.

    States that later tokens overwrite (sliding windows, recurrent) are kept as they are.
    """
    new = with_states(boundary, cache_states(boundary))
    for layer, whole in zip(new.layers, last.layers, strict=True):
        if _has_keys(layer) and not layer.is_sliding:
            tokens = layer.keys.shape[-2]
            layer.keys, layer.values = whole.keys[..., :tokens, :], whole.values[..., :tokens, :]
    return new


def with_boundary(boundaries: Sequence[DynamicCache], last: DynamicCache) -> list[DynamicCache]:
    """The caches at the ends of all segments so far: earlier ones share the storage of `last`."""
    return [*(share_prefix_storage(earlier, last) for earlier in boundaries), last]


def _has_keys(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None


# Prefill for scoring


def prompt_segments(tokens: int, chunk_tokens: int | None) -> list[range]:
    """Split a prompt into ranges of `chunk_tokens` tokens; None for a single range.

    Every range has at least two tokens, unless the prompt has only one, so the last range may be one token longer.
    """
    if chunk_tokens is None or tokens <= chunk_tokens:
        return [range(tokens)] if tokens else []
    ends = list(range(max(2, chunk_tokens), tokens - 1, max(2, chunk_tokens)))
    return [range(start, end) for start, end in zip([0, *ends], [*ends, tokens], strict=True)]


def prefill(lm: PreTrainedModel, prompts_kS: Tensor, **options: Any) -> DynamicCache | None:
    """The cache of all tokens except the last one; None for prompts of one token.

    Args:
        options: further keyword arguments for the backbone's forward.
    """
    whole = prompt_segments(prompts_kS.size(1) - 1, None)
    return prefill_segment(lm, prompts_kS, whole[0], None, **options) if whole else None


def prefill_in_segments(
    lm: PreTrainedModel, prompts_kS: Tensor, chunk_tokens: int | None, **options: Any
) -> Iterator[DynamicCache]:
    """The cache at the end of each segment. Computing the next cache does not change it."""
    cache = None
    for segment in prompt_segments(prompts_kS.size(1) - 1, chunk_tokens):
        before = None if cache is None else fork(cache, range(len(prompts_kS)))
        cache = prefill_segment(lm, prompts_kS, segment, before, **options)
        yield cache


def prefill_segment(
    lm: PreTrainedModel, prompts_kS: Tensor, segment: range, cache: DynamicCache | None, **options: Any
) -> DynamicCache:
    """The cache at the end of a segment; `cache` is the one at its start, and is modified."""
    with grouped_attention():
        output = lm.base_model(
            input_ids=prompts_kS[:, segment.start : segment.stop],
            past_key_values=cache,
            position_ids=torch.arange(segment.start, segment.stop, device=prompts_kS.device).unsqueeze(0),
            use_cache=True,
            **flash_lengths(lm, prompts_kS[:, segment.start : segment.stop], cache),
            **options,
        )
    return output.past_key_values


# Prefill for sampling


@dataclass(frozen=True, kw_only=True)
class PrefilledPrompts:
    """The caches of the prefilled prompts, and for each prompt its cache row and its next-token logits.

    Attributes:
        caches: one per forward; a row may be padded on the left.
        row_of: index of each prompt into the rows of all `caches` and into `logits_PV`.
        logits_PV: logits after the last token of each prompt.
    """

    caches: list[DynamicCache]
    row_of: dict[Prompt, int]
    logits_PV: Tensor


def prefill_prompts(
    lm: PreTrainedModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    kept: Mapping[Prompt, DynamicCache],
    **options: Any,
) -> PrefilledPrompts:
    """Prefill each distinct prompt once, from the end of its longest kept prefix.

    Prompts with the same number of remaining tokens share a forward, so input ids are never padded.

    Args:
        kept: caches of one row each, by their tokens.
        options: further keyword arguments for the model's forward.
    """
    batches: dict[tuple[bool, int], list[tuple[Prompt, int]]] = {}
    lengths = sorted({len(prefix) for prefix in kept}, reverse=True)
    for prompt in dict.fromkeys(prompts):
        start = next((length for length in lengths if length < len(prompt) and prompt[:length] in kept), 0)
        batches.setdefault((start > 0, len(prompt) - start), []).append((prompt, start))
    caches, logits = [], []
    row_of: dict[Prompt, int] = {}
    for batch in batches.values():
        starts_k = torch.tensor([start for _, start in batch], device=device)
        ids_kS = torch.tensor([prompt[start:] for prompt, start in batch], device=device)
        cache = mask_kT = None
        if any(start for _, start in batch):
            cache = join_caches(
                [kept[prompt[:start]] for prompt, start in batch], torch.arange(len(batch), device=device)
            )
            padding_k = starts_k.max() - starts_k
            if padding_k.any():
                positions_T = torch.arange(int(starts_k.max()) + ids_kS.size(1), device=device)
                mask_kT = (positions_T >= padding_k.unsqueeze(1)).long()
        with grouped_attention():
            output = lm(
                input_ids=ids_kS,
                position_ids=starts_k.unsqueeze(1) + torch.arange(ids_kS.size(1), device=device),
                attention_mask=mask_kT,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **flash_lengths(lm, ids_kS, cache),
                **options,
            )
        caches.append(output.past_key_values)
        logits.append(output.logits[:, -1])
        row_of |= {prompt: len(row_of) + i for i, (prompt, _) in enumerate(batch)}
    return PrefilledPrompts(caches=caches, row_of=row_of, logits_PV=torch.cat(logits))
