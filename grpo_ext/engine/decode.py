"""Draw completions: every prompt is read once for all of its siblings, and finished rows leave the batch.

In: what `generate` of transformers prepared, its logits processors and stopping criteria among it. Out: the tokens that
its own sampling loop would have drawn from the same random state, and the log-prob of each of them.

    sampler = GroupSampler(temperature=0.8)
    sequences_BT = lm.generate(input_ids, attention_mask=mask, custom_generate=sampler)
    sampler.completions.logps        # a list of floats a row

Legend: B rows, P distinct prompts, S prompt tokens, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from grpo_ext.engine.batch import strip_padding
from grpo_ext.engine.decode_cache import DecodeBatch, can_share_slot
from grpo_ext.engine.prefill import PrefilledPrompts, Prompt, prefill_prompts


@dataclass(frozen=True, kw_only=True)
class SampledCompletions:
    """What the sampler drew, row by row.

    Attributes:
        tokens: of the completion, with the end-of-sequence token where one was drawn.
        logps: of each token, under the full distribution at the sampler's temperature (nats), whatever the processors
            left of it.
        is_cut: whether the row ended because no more tokens or time were allowed.
    """

    tokens: list[list[int]]
    logps: list[list[float]]
    is_cut: list[bool]


class GroupSampler:
    """A decoding loop for `generate(custom_generate=...)`, for one sequence a row, sampled or greedy.

    Args:
        temperature: of the log-probs; the one that tokens are drawn at is among the logits processors.

    Attributes:
        temperature: as given; it may be set anew between calls.
        max_new_tokens_per_row: bounds for the next call, in addition to that of `generate`; None for none.
        completions: of the last call; None before it.
    """

    completions: SampledCompletions | None

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.max_new_tokens_per_row: Sequence[int] | None = None
        self._keeps_prompts = self._keeps_rows = False
        self._kept: PrefilledPrompts | None = None
        self._kept_rows: dict[Prompt, DynamicCache] = {}  # of the last call, by the tokens that they have read

    @contextmanager
    def keep_prompt_caches(self) -> Iterator[None]:
        """Until this is left, keep the states of the prompts that were read last: a call that asks for more answers to
        some of them reads nothing. The weights must not change meanwhile."""
        self._keeps_prompts = True
        try:
            yield
        finally:
            self._keeps_prompts, self._kept = False, None

    @contextmanager
    def keep_row_caches(self) -> Iterator[None]:
        """Until this is left, keep the states of the rows that were drawn last: a prompt of the next call that begins
        with such a row goes on from it, in any order of rows. The weights must not change meanwhile."""
        self._keeps_rows = True
        try:
            yield
        finally:
            self._keeps_rows, self._kept_rows = False, {}

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """The loop that `generate` calls.

        Args:
            input_ids: prompts padded on the left, shape (B, S).

        Returns:
            Prompts and completions, shape (B, S + C), finished rows padded on the right.
        """
        mask = model_kwargs["attention_mask"]
        prompts = strip_padding(input_ids, torch.ones_like(input_ids) if mask is None else mask)
        options = {name: value for name, value in model_kwargs.items() if name == "logits_to_keep"}
        states = self._kept
        if states is None or not states.row_of.keys() >= set(prompts):
            states = prefill_prompts(model, prompts, input_ids.device, self._kept_rows, **options)
        self._kept = states if self._keeps_prompts else None
        logits_BV = states.logits_PV[[states.row_of[prompt] for prompt in prompts]]
        most = stopping_criteria.max_length - input_ids.size(1)
        limits = (
            [most] * len(prompts)
            if self.max_new_tokens_per_row is None
            else [min(most, limit) for limit in self.max_new_tokens_per_row]
        )
        batch = start_decoding(model, states, prompts, max_new_tokens=max(limits))
        del states
        self._kept_rows = {}
        prompt_tokens = input_ids.size(1)
        is_alive_B = torch.ones(len(prompts), dtype=torch.bool, device=input_ids.device)
        is_cut_B = torch.zeros_like(is_alive_B)
        lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=input_ids.device)
        limits_B = torch.tensor(limits, device=input_ids.device)
        ended: dict[int, DynamicCache] = {}
        logps: list[Tensor] = []
        with model._optimize_model_for_decode():
            while True:
                tokens_B, logps_B = self._sample_tokens(
                    input_ids, logits_BV, logits_processor, generation_config.do_sample
                )
                logps.append(logps_B)
                tokens_B = tokens_B.where(is_alive_B, generation_config._pad_token_tensor)
                input_ids = torch.cat([input_ids, tokens_B.unsqueeze(1)], dim=1)
                lengths_B += is_alive_B
                stops_B, cuts_B = _stops(stopping_criteria, input_ids)
                cuts_B |= lengths_B >= limits_B
                is_cut_B |= is_alive_B & cuts_B & ~stops_B
                is_alive_B &= ~(stops_B | cuts_B)
                alive = is_alive_B.tolist()
                if self._keeps_rows:
                    ended |= {row: batch.extract_row(row) for row in batch.active_rows if not alive[row]}
                if not any(alive):
                    break
                batch.drop_finished(alive)
                rows, logits = batch.step(model, tokens_B, **options)
                logits_BV = logits.new_zeros(len(prompts), logits.size(1)).index_copy_(0, rows, logits)
        tokens = _cut(input_ids[:, prompt_tokens:], lengths_B)
        # The last token of a row was drawn, and not read.
        self._kept_rows = {prompts[row] + tuple(tokens[row][:-1]): cache for row, cache in ended.items()}
        self.completions = SampledCompletions(
            tokens=tokens,
            logps=_cut(torch.stack(logps, dim=1), lengths_B),
            is_cut=is_cut_B.tolist(),
        )
        return input_ids

    def _sample_tokens(
        self, input_ids: Tensor, logits_BV: Tensor, logits_processor: LogitsProcessorList, do_sample: bool
    ) -> tuple[Tensor, Tensor]:
        """The next token of every row, finished ones too (their logits are zeros), and its log-prob, shapes (B,).

        So processors that hold something of each row find it, and the random state moves as in transformers' loop.
        """
        tempered_BV = logits_BV.float() / self.temperature
        scores_BV = logits_processor(input_ids, logits_BV.to(torch.float32, copy=True))
        if do_sample:
            tokens_B = torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens_B = scores_BV.argmax(dim=-1)
        return tokens_B, tempered_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - tempered_BV.logsumexp(dim=-1)


def start_decoding(
    lm: PreTrainedModel, states: PrefilledPrompts, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> DecodeBatch:
    """DecodeBatch for rows that continue these prompts, `prompts[i]` the one of row i.

    Where siblings can share a slot, as many do as their completions together are no longer than the shortest prompt:
    what is gained is that a prompt is held and read once for all of them, what is paid is that each sibling also looks
    past the tokens of the others.
    """
    rows_of: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    width = max(1, min(map(len, prompts)) // max_new_tokens) if can_share_slot(lm, states.caches[0]) else 1
    batch = [rows[i : i + width] for rows in rows_of.values() for i in range(0, len(rows), width)]
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=states.logits_PV.device)
    return DecodeBatch(states.caches, [states.row_of[prompts[slot[0]]] for slot in batch], batch, lengths_B)


def _stops(criteria: StoppingCriteriaList, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows came to an end by themselves, and which have no more tokens or time; shapes (B,)."""
    stops = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    cuts = stops.clone()
    for criterion in criteria:
        met = criterion(input_ids, None)
        if isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria):
            cuts |= met
        else:
            stops |= met
    return stops, cuts


def _cut(values_BC: Tensor, lengths_B: Tensor) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values_BC.tolist(), lengths_B.tolist(), strict=True)]
