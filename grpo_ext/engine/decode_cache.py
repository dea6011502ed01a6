"""Where the rows of a batch stand in the cache while they are decoded, and how finished ones leave it.

In: the caches of the prompts that were read. A slot is one row of the decoding cache: a prompt's states, and behind
them the tokens of one or of several siblings. With several, the prompt's states are held and read once for all of
them, and an attention mask keeps the siblings apart:

    cache of a slot   [. . p p p p | a b | a b | a b]      . padding, p prompt, a and b two siblings
    queries           [a b]                                a sees p and a, b sees p and b

Legend: R slots, n rows of a slot, B rows of the batch, T cached tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_ext.engine.prefill import cache_states, extract_cache_row, join_caches, with_states

PROMPT, NOBODY = -1, -2  # owners of a cached token, beside the rows: every row of its slot, none of them
NO_ROW = -3  # a place in a slot without a row


class DecodeBatch:
    """A batch in the middle of its decoding.

    Args:
        caches: what the prompts left, see `prompt_cache.join`.
        prompts: of each slot, its index in `caches`.
        rows: of each slot, the rows of the batch on it.
        prompt_lengths: tokens of each row's prompt, shape (B,).
    """

    def __init__(
        self, caches: Sequence[DynamicCache], prompts: list[int], rows: list[list[int]], prompt_lengths: Tensor
    ):
        self._device = prompt_lengths.device
        self._cache = _growing(join_caches(caches, torch.tensor(prompts, device=self._device)))
        self._is_packed = any(len(slot) > 1 for slot in rows)
        self._positions_B = prompt_lengths
        longest = max(cache.get_seq_length() for cache in caches)
        padding_R = longest - prompt_lengths[torch.tensor([slot[0] for slot in rows], device=self._device)]
        is_padding_RT = torch.arange(longest, device=self._device) < padding_R.unsqueeze(1)
        self._owners_RT = torch.where(is_padding_RT, NOBODY, PROMPT)
        self._is_padded = bool(is_padding_RT.any())
        self._place(rows)

    def _place(self, rows: list[list[int]]) -> None:
        self._slots = rows
        width = max(map(len, rows))
        padded = [slot + [NO_ROW] * (width - len(slot)) for slot in rows]
        self._rows_Rn = torch.tensor(padded, device=self._device)
        self._is_row_Rn = self._rows_Rn >= 0

    @property
    def active_rows(self) -> list[int]:
        """Those that are left."""
        return [row for slot in self._slots for row in slot]

    def step(self, lm: PreTrainedModel, tokens_B: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Feed one token of every row that is left.

        Returns:
            The indices of these rows and their logits for the token after it, shape (rows left, V).
        """
        places_Rn = self._rows_Rn.clamp(min=0)
        owners_Rn = self._rows_Rn.masked_fill(~self._is_row_Rn, NOBODY)
        self._owners_RT = torch.cat([self._owners_RT, owners_Rn], dim=1)
        if "logits_to_keep" in options:
            options["logits_to_keep"] = self._rows_Rn.size(1)
        output = lm(
            input_ids=tokens_B[places_Rn],
            position_ids=self._positions_B[places_Rn],
            attention_mask=self._attention_mask(lm),
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        self._positions_B = self._positions_B + 1
        return self._rows_Rn[self._is_row_Rn], output.logits[self._is_row_Rn]

    def _attention_mask(self, lm: PreTrainedModel) -> Tensor | None:
        if not self._is_packed:
            return (self._owners_RT != NOBODY).long() if self._is_padded else None
        owners_R1T = self._owners_RT.unsqueeze(1)
        sees_RnT = (owners_R1T == PROMPT) | (owners_R1T == self._rows_Rn.unsqueeze(2))
        mask_RnT = torch.zeros_like(sees_RnT, dtype=lm.dtype).masked_fill(~sees_RnT, torch.finfo(lm.dtype).min)
        return mask_RnT.unsqueeze(1)

    def extract_row(self, row: int) -> DynamicCache:
        """The states of a row that is left: of its prompt and of its tokens that were fed, without padding."""
        slot = next(i for i, rows in enumerate(self._slots) if row in rows)
        owners_T = self._owners_RT[slot]
        return _settled(extract_cache_row(self._cache, slot, (owners_T == PROMPT) | (owners_T == row)))

    def drop_finished(self, is_alive: Sequence[bool]) -> None:
        """Let finished rows leave, and slots without rows with them."""
        rows = [[row for row in slot if is_alive[row]] for slot in self._slots]
        if rows == self._slots:
            return
        left = [i for i, slot in enumerate(rows) if slot]
        if len(left) < len(rows):
            index = torch.tensor(left, device=self._device)
            states = [state[index] for state in cache_states(self._cache)]
            self._cache = _growing(with_states(self._cache, states))
            self._owners_RT = self._owners_RT[index]
            self._is_padded = bool((self._owners_RT == NOBODY).any())
        self._place([rows[i] for i in left])


def can_share_slot(lm: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether siblings can share a slot: only keys and values of all tokens, places told by `position_ids` alone, and
    an attention that takes a mask of its own."""
    config = lm.config.get_text_config()
    return (
        all(type(layer) is DynamicLayer for layer in cache.layers)
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(config, "alibi", False)
    )


class _Growing(DynamicLayer):
    """Keys and values in a buffer with room for tokens to come: a new token is written where `DynamicLayer` copies all
    that it has."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor] | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            capacity = end + max(64, end // 8)
            self.room = _with_room(self.keys, capacity), _with_room(self.values, capacity)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = self.room[0][..., :end, :], self.room[1][..., :end, :]
        return self.keys, self.values


def _with_room(states: Tensor, capacity: int) -> Tensor:
    room = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room


def _settled(cache: DynamicCache) -> DynamicCache:
    """The cache itself, its layers those of transformers again."""
    for layer in cache.layers:
        if type(layer) is _Growing:
            layer.__class__ = DynamicLayer
            del layer.room
    return cache


def _growing(cache: DynamicCache) -> DynamicCache:
    """The cache itself, its layers that hold keys and values of all tokens made to grow in place."""
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, _Growing):
            layer.__class__ = _Growing
            layer.room = None
    return cache
