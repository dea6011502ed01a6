"""A prompt's states (keys, values, convolution, recurrent): read them, put others in their place, fork them.

In: the cache that a transformers model filled while it read a prompt. Out: caches for n siblings that share it. The
states are plain tensors, so a fork with gradients is `write_states(cache, [leaf[rows] ...])`.

Nothing here depends on how a model attends: it goes by the layers of transformers' own `DynamicCache`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# Layers whose states are all in `keys`, `values`, `conv_states` and `recurrent_states`, batch dimension first.
FORKABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class _OutOfPlace(LinearAttentionLayer):
    """A layer that replaces its states where transformers' own writes into them, which autograd refuses once a state
    was read under a graph."""

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


def why_not_forkable(cache: Any) -> str | None:
    """The reason why this cache cannot be forked exactly, in words for a log; None where it can."""
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    other = next((layer for layer in cache.layers if type(layer) not in FORKABLE_LAYERS), None)
    return None if other is None else f"its cache has layers of type {type(other).__name__}"


def read_states(cache: DynamicCache) -> list[Tensor]:
    """Every state tensor of the cache, layer by layer, in a fixed order; batch dimension first."""
    states = []
    for layer in cache.layers:
        if _has_keys(layer):
            states += [layer.keys, layer.values]
        for name in _STATE_DICTS:
            states += [state for state in getattr(layer, name, {}).values() if state is not None]
    return states


def write_states(cache: DynamicCache, states: Sequence[Tensor]) -> DynamicCache:
    """A new cache like `cache` that holds `states`, in the order of `read_states`; `cache` is left as it was."""
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
    assert next(remaining, None) is None, "more states than the cache has places for"
    return new


def fork(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """The cache of siblings, the i-th of which goes on from row `rows[i]`; gradients of the copies add up in the row.

    The states are copied, so that layers which write into them in place leave the original alone.
    """
    states = read_states(cache)
    index = torch.tensor(list(rows), device=states[0].device)
    return write_states(cache, [state.index_select(0, index) for state in states])


def join(caches: Sequence[DynamicCache], rows: Tensor) -> DynamicCache:
    """One cache, whose row i goes on from the prompt `rows[i]`, an index into the rows of all `caches` in turn.

    The keys and values of shorter prompts are padded on the left, where only an attention mask hides them.
    """
    longest = max(caches, key=lambda cache: cache.get_seq_length())
    joined = []
    for parts in zip(*map(read_states, [longest, *caches]), strict=True):
        tokens = parts[0].shape[-2]  # states without a token dimension have equal shapes
        joined.append(torch.cat([pad(part, (0, 0, tokens - part.shape[-2], 0)) for part in parts[1:]])[rows])
    return write_states(longest, joined)


def row_alone(cache: DynamicCache, row: int, is_own_T: Tensor) -> DynamicCache:
    """A cache that holds one row of `cache` and nothing else: of its T tokens those that are its own.

    Args:
        is_own_T: which these are, shape (T,). In sliding windows nothing may stand between them.
    """
    alone = fork(cache, [row])
    own_of: dict[int, Tensor] = {}  # of the last n tokens, the indices of those that are its own
    for layer in alone.layers:
        if _has_keys(layer):
            tokens = layer.keys.shape[-2]
            if tokens not in own_of:
                own_of[tokens] = is_own_T[len(is_own_T) - tokens :].nonzero().flatten()
            layer.keys, layer.values = (states[..., own_of[tokens], :] for states in (layer.keys, layer.values))
            if layer.is_sliding:
                layer.cumulative_length = int(is_own_T.sum())
    return alone


def _has_keys(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None


def slice_of(boundary: DynamicCache, last: DynamicCache) -> DynamicCache:
    """`boundary` with the keys and values that grow by concatenation replaced by views into those of `last`, which
    begin with them; states that are overwritten as a prompt goes on (sliding windows, recurrent) are kept."""
    new = write_states(boundary, read_states(boundary))
    for layer, whole in zip(new.layers, last.layers, strict=True):
        if _has_keys(layer) and not layer.is_sliding:
            tokens = layer.keys.shape[-2]
            layer.keys, layer.values = whole.keys[..., :tokens, :], whole.values[..., :tokens, :]
    return new
