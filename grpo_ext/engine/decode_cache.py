"""The KV cache during decoding: which rows it holds, and how finished rows leave it.

In: the caches of the prefilled prompts. A slot is one row of the decoding cache: the states of a prompt, followed by
the tokens of one or several siblings. If siblings share a slot, the prompt's states are stored and read once for all of
them, and an attention mask keeps the siblings apart:

    cache of a slot   [. . p p p p | a b | a b | a b]      . padding, p prompt, a and b two siblings
    queries           [a b]                                a sees p and a, b sees p and b

Legend: R slots, n rows of a slot, Q = R * n places, B rows of the batch, T cached tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_ext.engine.grouped_attention import grouped_attention
from grpo_ext.engine.prefill import cache_states, extract_cache_row, join_caches, with_states

# Owners of cached tokens that belong to no row: all rows of the slot see a PROMPT token, no row sees a HIDDEN one.
PROMPT, HIDDEN = -1, -2
NO_ROW = -3  # an unused place in a slot
# The buffers of the cache grow by this many tokens, or by this part of their length.
MIN_GROWTH, GROWTH_DIVISOR = 64, 8


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
        self._cache = join_caches(caches, torch.tensor(prompts, device=self._device))
        self._make_room()
        self._is_packed = any(len(slot) > 1 for slot in slots)
        self._positions_B = prompt_lengths.clone()
        longest = max(cache.get_seq_length() for cache in caches)
        padding_R = longest - prompt_lengths[torch.tensor([slot[0] for slot in slots], device=self._device)]
        is_padding_RT = torch.arange(longest, device=self._device) < padding_R.unsqueeze(1)
        self._owners_RT = torch.where(is_padding_RT, HIDDEN, PROMPT)
        self._is_padded = bool(is_padding_RT.any())
        self._set_slots(slots)

    def _make_room(self) -> None:
        """Let the layers that hold keys and values of all tokens grow in place."""
        for layer in self._cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = _GrowingLayer
                layer.buffers = None

    def _set_slots(self, slots: list[list[int]]) -> None:
        self._slots = slots
        width = max(map(len, slots))
        padded = [slot + [NO_ROW] * (width - len(slot)) for slot in slots]
        self._rows_Rn = torch.tensor(padded, device=self._device)
        self._owners_Rn = self._rows_Rn.where(self._rows_Rn >= 0, HIDDEN)
        # The rows, and their places in a flat (R, n): known here, so that no step waits for the device.
        places = [i * width + j for i, slot in enumerate(slots) for j in range(len(slot))]
        is_whole = self.rows == list(range(len(self._positions_B)))
        self._places = None if len(places) == len(slots) * width else torch.tensor(places, device=self._device)
        self._row_of_place = None if is_whole else torch.tensor(self.rows, device=self._device)

    @property
    def rows(self) -> list[int]:
        """The rows that are in a slot."""
        return [row for slot in self._slots for row in slot]

    @property
    def cache_layers(self) -> list[Any]:
        """The layers of the cache."""
        return self._cache.layers

    def step(self, lm: PreTrainedModel, tokens_B: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Run the model on one token per row.

        Args:
            options: further keyword arguments for the model's forward.

        Returns:
            Logits for the next token of the rows that are in a slot, shape (rows, V), and which rows these are; None if
            they are all rows, in order.
        """
        self._owners_RT = torch.cat([self._owners_RT, self._owners_Rn], dim=1)
        logits_QV = self._forward(lm, tokens_B, self._attention_mask(lm), **options)
        self._positions_B += 1
        return self._used(logits_QV)

    def _forward(self, lm: PreTrainedModel, tokens_B: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """Logits of all places, shape (Q, V)."""
        rows_Rn = self._rows_Rn.clamp(min=0)
        if "logits_to_keep" in options:
            options["logits_to_keep"] = rows_Rn.size(1)
        with grouped_attention():
            output = lm(
                input_ids=tokens_B[rows_Rn],
                position_ids=self._positions_B[rows_Rn],
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **options,
            )
        logits_QV: Tensor = output.logits.flatten(0, 1)
        return logits_QV

    def _used(self, logits_QV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of the places that hold a row, and the rows that they hold."""
        logits = logits_QV if self._places is None else logits_QV.index_select(0, self._places)
        return logits, self._row_of_place

    def _attention_mask(self, lm: PreTrainedModel) -> Tensor | None:
        if not self._is_packed:
            return (self._owners_RT != HIDDEN).long() if self._is_padded else None
        return self._mask_by_owner(self._owners_RT, lm.dtype)

    def _mask_by_owner(self, owners_RT: Tensor, dtype: torch.dtype) -> Tensor:
        """An additive mask: each place sees the prompt and the tokens of its own row; shape (R, 1, n, T)."""
        owners_R1T = owners_RT.unsqueeze(1)
        sees_RnT = (owners_R1T == PROMPT) | (owners_R1T == self._rows_Rn.unsqueeze(2))
        mask_RnT = torch.zeros_like(sees_RnT, dtype=dtype).masked_fill(~sees_RnT, torch.finfo(dtype).min)
        return mask_RnT.unsqueeze(1)

    def extract_row(self, row: int) -> DynamicCache:
        """A cache of one row, without padding: the states of its prompt and of the tokens fed so far."""
        slot = next(i for i, rows in enumerate(self._slots) if row in rows)
        owners_T = self._owners_RT[slot]
        extracted = extract_cache_row(self._cache, slot, (owners_T == PROMPT) | (owners_T == row))
        for layer in extracted.layers:
            if isinstance(layer, BufferedLayer):
                layer.__class__ = DynamicLayer
                del layer.buffers
        return extracted

    def skip_steps(self, steps: int) -> None:
        """Let the cache grow as it would in this many steps, with undefined values. This is for plans of memory."""
        width, left = self._rows_Rn.size(1), steps * self._rows_Rn.size(1)
        while left > 0:
            # In larger parts than a step, but smaller than those in which buffers grow.
            new = min(left, max(width, MIN_GROWTH, self._cache.get_seq_length() // (2 * GROWTH_DIVISOR)))
            for layer in self._cache.layers:
                if getattr(layer, "keys", None) is not None:
                    layer.update(*(_undefined(states, new) for states in (layer.keys, layer.values)))
            left -= new
        self._owners_RT = pad(self._owners_RT, (0, steps * width))

    def drop_finished(self, is_active: Sequence[bool]) -> None:
        """Remove inactive rows, and slots that no longer hold a row."""
        slots = [[row for row in slot if is_active[row]] for slot in self._slots]
        if slots != self._slots:
            self._keep(slots)

    def _keep(self, slots: list[list[int]]) -> None:
        """Keep these rows in the present slots; slots at the end move into those without a row."""
        kept = [i for i, slot in enumerate(slots) if slot]
        if len(kept) < len(slots):
            order = _fill_gaps(kept)
            index = torch.tensor(order, device=self._device)
            self._cache = _keep_slots(self._cache, order, index)
            self._owners_RT = self._owners_RT[index]
            self._is_padded = bool((self._owners_RT == HIDDEN).any())
            slots = [slots[i] for i in order]
        self._set_slots(slots)


def _fill_gaps(kept: list[int]) -> list[int]:
    """The slots to keep (ascending) in an order that leaves most of them in place: [0, 2, 3] -> [0, 3, 2]."""
    order = list(range(len(kept)))
    staying = set(kept) & set(order)
    movers = iter(kept[len(staying) :])
    return [slot if slot in staying else next(movers) for slot in order]


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


class BufferedLayer(DynamicLayer):
    """Keeps keys and values in buffers that are longer than the cached tokens."""

    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor] | None

    def keep(self, slots: Sequence[int]) -> None:
        """Keep these slots only. They are moved one after the other within the buffers: no second copy is made.

        Args:
            slots: the slot for each place, see `_fill_gaps`. One that moves takes the place of one that is not kept.
        """
        assert self.buffers is not None
        tokens = self.keys.shape[-2]
        for buffer in self.buffers:
            for place, slot in enumerate(slots):
                if place != slot:
                    buffer[place, :, :tokens] = buffer[slot, :, :tokens]
        keys, values = (buffer[: len(slots)] for buffer in self.buffers)
        self.buffers = keys, values
        self.show(tokens)

    def show(self, tokens: int) -> None:
        """Set keys and values to the first tokens of the buffers."""
        assert self.buffers is not None
        self.keys, self.values = (buffer[..., :tokens, :] for buffer in self.buffers)


class _GrowingLayer(BufferedLayer):
    """A new token is written in place, whereas `DynamicLayer` copies all tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            capacity = end + max(MIN_GROWTH, end // GROWTH_DIVISOR)
            self.buffers = reallocate(self.keys, capacity), reallocate(self.values, capacity)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.show(end)
        return self.keys, self.values


def _keep_slots(cache: DynamicCache, slots: Sequence[int], index: Tensor) -> DynamicCache:
    """The cache with these slots only; `index` is the same as `slots`. Layers with buffers keep them in place."""
    kept = set()
    for layer in cache.layers:
        if isinstance(layer, BufferedLayer) and layer.buffers is not None:
            layer.keep(slots)
            kept |= {id(layer.keys), id(layer.values)}
    return with_states(cache, [state if id(state) in kept else state[index] for state in cache_states(cache)])


def _undefined(states: Tensor, tokens: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], tokens, states.shape[-1])


def reallocate(states: Tensor, capacity: int) -> Tensor:
    """A buffer for `capacity` tokens that begins with these states; the rest is zero."""
    buffer = states.new_zeros(*states.shape[:-2], capacity, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer
