"""The KV cache during decoding: which rows it holds, and how finished rows leave it.

In: the caches of the prefilled prompts. A slot is one row of the decoding cache: the states of a prompt, followed by
the tokens of one or several siblings. If siblings share a slot, the prompt's states are stored and read once for all of
them, and an attention mask keeps the siblings apart:

    cache of a slot   [. . p p p p | a b | a b | a b]      . padding, p prompt, a and b two siblings
    queries           [a b]                                a sees p and a, b sees p and b

Legend: R slots, n rows of a slot, Q = R * n, B rows of the batch, T cached tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_ext.engine.grouped_attention import grouped_attention
from grpo_ext.engine.prefill import cache_states, extract_cache_row, join_caches, with_states

# Owners of cached tokens that belong to no row: all rows of the slot see a PROMPT token, no row sees a HIDDEN one.
PROMPT, HIDDEN = -1, -2
NO_ROW = -3  # an unused position in a slot


class DecodeBatch:
    """The rows that are being decoded, and their cache.

    Args:
        caches: the caches of the prefilled prompts, see `join_caches`.
        prompts: for each slot, an index into the rows of `caches`.
        slots: for each slot, its rows of the batch.
        prompt_lengths: prompt tokens of each row, shape (B,).
    """

    def __init__(
        self, caches: Sequence[DynamicCache], prompts: list[int], slots: list[list[int]], prompt_lengths: Tensor
    ):
        self._device = prompt_lengths.device
        self._cache = _with_spare_capacity(join_caches(caches, torch.tensor(prompts, device=self._device)))
        self._is_packed = any(len(slot) > 1 for slot in slots)
        self._positions_B = prompt_lengths
        longest = max(cache.get_seq_length() for cache in caches)
        padding_R = longest - prompt_lengths[torch.tensor([slot[0] for slot in slots], device=self._device)]
        is_padding_RT = torch.arange(longest, device=self._device) < padding_R.unsqueeze(1)
        self._owners_RT = torch.where(is_padding_RT, HIDDEN, PROMPT)
        self._is_padded = bool(is_padding_RT.any())
        self._set_slots(slots)

    def _set_slots(self, slots: list[list[int]]) -> None:
        self._slots = slots
        width = max(map(len, slots))
        padded = [slot + [NO_ROW] * (width - len(slot)) for slot in slots]
        self._rows_Rn = torch.tensor(padded, device=self._device)
        self._owners_Rn = self._rows_Rn.where(self._rows_Rn >= 0, HIDDEN)
        # The active rows, and their places in a flat (R, n): known here, so that no step waits for the device.
        places = [i * width + j for i, slot in enumerate(slots) for j in range(len(slot))]
        self._places = torch.tensor(places, device=self._device)
        self._active_rows = torch.tensor(self.active_rows, device=self._device)

    @property
    def active_rows(self) -> list[int]:
        return [row for slot in self._slots for row in slot]

    def step(self, lm: PreTrainedModel, tokens_B: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Run the model on one token per active row.

        Args:
            options: further keyword arguments for the model's forward.

        Returns:
            Indices of the active rows, and their logits for the next token, shape (active rows, V).
        """
        rows_Rn = self._rows_Rn.clamp(min=0)
        self._owners_RT = torch.cat([self._owners_RT, self._owners_Rn], dim=1)
        if "logits_to_keep" in options:
            options["logits_to_keep"] = self._rows_Rn.size(1)
        with grouped_attention():
            output = lm(
                input_ids=tokens_B[rows_Rn],
                position_ids=self._positions_B[rows_Rn],
                attention_mask=self._attention_mask(lm),
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **options,
            )
        self._positions_B = self._positions_B + 1
        logits_QV = output.logits.flatten(0, 1)
        is_full = len(self._places) == len(logits_QV)
        return self._active_rows, logits_QV if is_full else logits_QV[self._places]

    def _attention_mask(self, lm: PreTrainedModel) -> Tensor | None:
        if not self._is_packed:
            return (self._owners_RT != HIDDEN).long() if self._is_padded else None
        owners_R1T = self._owners_RT.unsqueeze(1)
        sees_RnT = (owners_R1T == PROMPT) | (owners_R1T == self._rows_Rn.unsqueeze(2))
        mask_RnT = torch.zeros_like(sees_RnT, dtype=lm.dtype).masked_fill(~sees_RnT, torch.finfo(lm.dtype).min)
        return mask_RnT.unsqueeze(1)

    def extract_row(self, row: int) -> DynamicCache:
        """A cache of one active row, without padding: the states of its prompt and of the tokens fed so far."""
        slot = next(i for i, rows in enumerate(self._slots) if row in rows)
        owners_T = self._owners_RT[slot]
        return _without_spare_capacity(extract_cache_row(self._cache, slot, (owners_T == PROMPT) | (owners_T == row)))

    def drop_finished(self, is_active: Sequence[bool]) -> None:
        """Remove inactive rows, and slots that no longer hold a row."""
        slots = [[row for row in slot if is_active[row]] for slot in self._slots]
        if slots == self._slots:
            return
        kept = [i for i, slot in enumerate(slots) if slot]
        if len(kept) < len(slots):
            index = torch.tensor(kept, device=self._device)
            self._cache = _keep_slots(self._cache, kept, index)
            self._owners_RT = self._owners_RT[index]
            self._is_padded = bool((self._owners_RT == HIDDEN).any())
        self._set_slots([slots[i] for i in kept])


def can_share_slot(lm: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether siblings can share a slot of the cache.

    This requires layers that hold only the keys and values of all tokens, positions given by `position_ids` alone, and
    attention that accepts a custom mask.
    """
    config = lm.config.get_text_config()
    return (
        all(type(layer) is DynamicLayer for layer in cache.layers)
        and config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(type(lm).forward).parameters  # BLOOM and MPT count the cached tokens
        and not getattr(config, "alibi", False)
    )


class _LayerWithSpareCapacity(DynamicLayer):
    """Keeps keys and values in a buffer with room to grow: a new token is written in place, whereas `DynamicLayer`
    copies all tokens."""

    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor] | None

    def keep(self, slots: Sequence[int]) -> None:
        """Keep these slots only, in ascending order. They move forward in the buffers: no second copy is made."""
        assert self.buffers is not None
        tokens = self.keys.shape[-2]
        for buffer in self.buffers:
            for place, slot in enumerate(slots):
                if place != slot:
                    buffer[place, :, :tokens] = buffer[slot, :, :tokens]
        keys, values = (buffer[: len(slots)] for buffer in self.buffers)
        self.buffers = keys, values
        self.keys, self.values = keys[..., :tokens, :], values[..., :tokens, :]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            capacity = end + max(64, end // 8)
            self.buffers = _reallocate(self.keys, capacity), _reallocate(self.values, capacity)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = self.buffers[0][..., :end, :], self.buffers[1][..., :end, :]
        return self.keys, self.values


def _keep_slots(cache: DynamicCache, slots: Sequence[int], index: Tensor) -> DynamicCache:
    """The cache with these slots only; `index` is the same as `slots`. Layers that grow in place shrink in place."""
    kept = set()
    for layer in cache.layers:
        if type(layer) is _LayerWithSpareCapacity and layer.buffers is not None:
            layer.keep(slots)
            kept |= {id(layer.keys), id(layer.values)}
    return with_states(cache, [state if id(state) in kept else state[index] for state in cache_states(cache)])


def _reallocate(states: Tensor, capacity: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer


def _with_spare_capacity(cache: DynamicCache) -> DynamicCache:
    """The same cache; its layers that hold the keys and values of all tokens grow in place from here on."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = _LayerWithSpareCapacity
            layer.buffers = None
    return cache


def _without_spare_capacity(cache: DynamicCache) -> DynamicCache:
    """The same cache, with transformers' own layers again."""
    for layer in cache.layers:
        if type(layer) is _LayerWithSpareCapacity:
            layer.__class__ = DynamicLayer
            del layer.buffers
    return cache
