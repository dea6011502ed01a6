"""Sampling completions: each prompt is prefilled once for all of its siblings, and finished rows leave the batch.

In: the arguments that transformers' `generate` passes to its decoding loop (logits processors, stopping criteria). Out:
the tokens that transformers' loop would sample from the same random state, and the log-prob of each token.

    sampler = GroupSampler(temperature=0.8)
    sequences_BT = lm.generate(input_ids, attention_mask=mask, custom_generate=sampler)
    sampler.completions.logps  # one list of floats per row

Legend: B rows, S prompt tokens, C completion tokens, T tokens so far, V vocabulary.
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
    TemperatureLogitsWarper,
)

from grpo_ext.engine.batch import strip_padding
from grpo_ext.engine.decode_cache import DecodeBatch, can_share_slot
from grpo_ext.engine.prefill import PrefilledPrompts, Prompt, prefill_prompts


@dataclass(frozen=True, kw_only=True)
class SampledCompletions:
    """The completions of one call of the sampler, row by row.

    Attributes:
        tokens: token ids, including the end-of-sequence token if it was sampled.
        logps: log-prob of each token in nats, under the full distribution at the sampler's temperature, unaffected by
            logits processors.
        is_cut: whether the row was ended by a limit on tokens or time.
    """

    tokens: list[list[int]]
    logps: list[list[float]]
    is_cut: list[bool]


class GroupSampler:
    """A decoding loop for `generate(custom_generate=...)`: one sequence per row, sampled or greedy.

    Args:
        temperature: that of the log-probs. For sampling, a logits processor applies the temperature.

    Attributes:
        temperature: see above; may be changed between calls.
        max_new_tokens_per_row: a limit for each row of the next call, in addition to that of `generate`; None for no
            further limit.
        completions: the result of the last call; None before the first one.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.completions: SampledCompletions | None = None
        self.max_new_tokens_per_row: Sequence[int] | None = None
        self._keeps_prompts = self._keeps_rows = False
        self._kept_prompts: PrefilledPrompts | None = None
        self._kept_rows: dict[Prompt, DynamicCache] = {}  # from the last call, by the tokens in each cache

    @contextmanager
    def keep_prompt_caches(self) -> Iterator[None]:
        """A context that keeps the caches of the last prefilled prompts: sampling more completions for them needs no
        prefill. The weights must not change inside it."""
        self._keeps_prompts = True
        try:
            yield
        finally:
            self._keeps_prompts, self._kept_prompts = False, None

    @contextmanager
    def keep_row_caches(self) -> Iterator[None]:
        """A context that keeps the caches of the last sampled rows: a prompt of the next call that begins with such a
        row continues from its cache, whatever the order of the rows. The weights must not change inside it."""
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
            input_ids: prompts, padded on the left, shape (B, S).

        Returns:
            Prompts and completions, shape (B, S + C); finished rows are padded on the right.
        """
        mask = model_kwargs["attention_mask"]
        prompts = strip_padding(input_ids, torch.ones_like(input_ids) if mask is None else mask)
        options = {name: value for name, value in model_kwargs.items() if name == "logits_to_keep"}
        prefilled = self._kept_prompts
        if prefilled is None or not prefilled.row_of.keys() >= set(prompts):
            prefilled = prefill_prompts(model, prompts, input_ids.device, self._kept_rows, **options)
        self._kept_prompts = prefilled if self._keeps_prompts else None
        logits_BV = prefilled.logits_PV[[prefilled.row_of[prompt] for prompt in prompts]]
        limits = [stopping_criteria.max_length - input_ids.size(1)] * len(prompts)
        if self.max_new_tokens_per_row is not None:
            limits = [min(limits[0], limit) for limit in self.max_new_tokens_per_row]
        batch = start_decoding(model, prefilled, prompts, max_new_tokens=max(limits))
        del prefilled
        self._kept_rows = {}
        prompt_tokens = input_ids.size(1)
        is_active_B = torch.ones(len(prompts), dtype=torch.bool, device=input_ids.device)
        is_cut_B = torch.zeros_like(is_active_B)
        lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=input_ids.device)
        limits_B = torch.tensor(limits, device=input_ids.device)
        finished_caches: dict[int, DynamicCache] = {}
        logps: list[Tensor] = []
        with model._optimize_model_for_decode():
            while True:
                tokens_B, logps_B = self._sample_tokens(
                    input_ids, logits_BV, logits_processor, generation_config.do_sample
                )
                logps.append(logps_B)
                tokens_B = tokens_B.where(is_active_B, generation_config._pad_token_tensor)
                input_ids = torch.cat([input_ids, tokens_B.unsqueeze(1)], dim=1)
                lengths_B += is_active_B
                stops_B, cuts_B = _check_stopping(stopping_criteria, input_ids)
                cuts_B |= lengths_B >= limits_B
                is_cut_B |= is_active_B & cuts_B & ~stops_B
                is_active_B &= ~(stops_B | cuts_B)
                is_active = is_active_B.tolist()
                if self._keeps_rows:
                    finished_caches |= {row: batch.extract_row(row) for row in batch.active_rows if not is_active[row]}
                if not any(is_active):
                    break
                batch.drop_finished(is_active)
                rows, logits = batch.step(model, tokens_B, **options)
                logits_BV = logits.new_zeros(len(prompts), logits.size(1)).index_copy_(0, rows, logits)
        logps_BC = torch.stack(logps, dim=1)
        if not logps_BC.isfinite().all():
            raise RuntimeError(
                "The model returned logits that are NaN or infinite while it sampled. In 16 bits, try float32 "
                "(bf16=False, fp16=False); otherwise look for NaN in the weights of the model and the adapter."
            )
        tokens = _truncate(input_ids[:, prompt_tokens:], lengths_B)
        # The last token of a row is sampled but not fed to the model.
        self._kept_rows = {prompts[row] + tuple(tokens[row][:-1]): cache for row, cache in finished_caches.items()}
        self.completions = SampledCompletions(
            tokens=tokens,
            logps=_truncate(logps_BC, lengths_B),
            is_cut=is_cut_B.tolist(),
        )
        return input_ids

    def _sample_tokens(
        self, input_ids: Tensor, logits_BV: Tensor, logits_processor: LogitsProcessorList, do_sample: bool
    ) -> tuple[Tensor, Tensor]:
        """The next token of every row and its log-prob, shapes (B,).

        Finished rows are included, with zeros for logits: processors that keep state per row need them, and the random
        state advances as in transformers' loop.
        """
        scores_BV = logits_processor(input_ids, logits_BV.to(torch.float32, copy=True))
        if do_sample:
            probs_BV = scores_BV.softmax(dim=-1)
            # `torch.multinomial` draws the same from the same random state, but first checks its input in three passes.
            noise_BV = torch.empty_like(probs_BV).exponential_()
            tokens_B = torch.div(probs_BV, noise_BV, out=noise_BV).argmax(dim=-1)
            if self._only_scales(logits_processor):
                return tokens_B, probs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1).log()
        else:
            tokens_B = scores_BV.argmax(dim=-1)
        tempered_BV = logits_BV.float() / self.temperature
        return tokens_B, tempered_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - tempered_BV.logsumexp(dim=-1)

    def _only_scales(self, logits_processor: LogitsProcessorList) -> bool:
        """Whether tokens are sampled from the distribution whose log-probs are reported."""
        if len(logits_processor) != 1:
            return not logits_processor and self.temperature == 1.0
        processor = logits_processor[0]
        return type(processor) is TemperatureLogitsWarper and processor.temperature == self.temperature


def start_decoding(
    lm: PreTrainedModel, prefilled: PrefilledPrompts, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> DecodeBatch:
    """A batch of rows that continue these prompts; `prompts[i]` is the prompt of row i.

    If siblings can share a slot, their number per slot is limited so that together their completions are no longer than
    the shortest prompt. A shared slot stores and reads its prompt once instead of once per row, but each sibling also
    attends over the masked tokens of the others.
    """
    rows_of: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    width = max(1, min(map(len, prompts)) // max_new_tokens) if can_share_slot(lm, prefilled.caches[0]) else 1
    slots = [rows[i : i + width] for rows in rows_of.values() for i in range(0, len(rows), width)]
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=prefilled.logits_PV.device)
    return DecodeBatch(prefilled.caches, [prefilled.row_of[prompts[slot[0]]] for slot in slots], slots, lengths_B)


def _check_stopping(criteria: StoppingCriteriaList, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows end on their own, and which reach a limit on tokens or time; shapes (B,)."""
    stops = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    cuts = stops.clone()
    for criterion in criteria:
        met = criterion(input_ids, None)
        if isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria):
            cuts |= met
        else:
            stops |= met
    return stops, cuts


def _truncate(values_BC: Tensor, lengths_B: Tensor) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values_BC.tolist(), lengths_B.tolist(), strict=True)]
