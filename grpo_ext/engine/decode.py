"""Sampling completions: each prompt is prefilled once for all of its siblings, and finished rows leave the batch.

In: the arguments that transformers' `generate` passes to its decoding loop (logits processors, stopping criteria). Out:
the tokens that transformers' loop would sample from the same random state, and the log-prob of each token.

    sampler = GroupSampler(temperature=0.8)
    sequences_BT = lm.generate(input_ids, attention_mask=mask, custom_generate=sampler)
    sampler.completions.logps  # one list of floats per row

Legend: B rows, R rows that are still decoded, S prompt tokens, C completion tokens, T tokens so far, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
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
from grpo_ext.engine.captured_decode import (
    CapturedSteps,
    FixedDecodeBatch,
    Step,
    StepRunner,
    capture_cuda_graph,
    run_uncaptured,
)
from grpo_ext.engine.decode_cache import DecodeBatch, can_share_slot
from grpo_ext.engine.draw import draw
from grpo_ext.engine.out_of_memory import is_out_of_memory
from grpo_ext.engine.prefill import PrefilledPrompts, Prompt, prefill_prompts
from grpo_ext.engine.stacked_lora import stacked_lora
from grpo_ext.engine.unpacked_weights import WeightUnpacker

logger = logging.getLogger(__name__)

# Tokens between checks for rows that have ended. On a GPU, each check waits for the device.
LOOK_EVERY = 8


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
        capture: captures decode steps, see `CapturedSteps`. By default, CUDA graphs on a GPU; elsewhere, nothing is
            captured.

    Attributes:
        temperature: see above; may be changed between calls.
        max_new_tokens_per_row: a limit for each row of the next call, in addition to that of `generate`; None for no
            further limit.
        completions: the result of the last call; None before the first one.
    """

    def __init__(self, temperature: float, *, capture: Callable[[Step], Step] | None = None):
        self.temperature = temperature
        self.completions: SampledCompletions | None = None
        self.max_new_tokens_per_row: Sequence[int] | None = None
        self._keeps_prompts = self._keeps_rows = False
        self._kept_prompts: PrefilledPrompts | None = None
        self._kept_rows: dict[Prompt, DynamicCache] = {}  # from the last call, by the tokens in each cache
        self._captured = None if capture is None else CapturedSteps(capture)
        self._max_rows: int | None = None  # rows that are sampled together, once more of them did not fit
        self._unpacker = WeightUnpacker()

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
        limits = [stopping_criteria.max_length - input_ids.size(1)] * len(input_ids)
        if self.max_new_tokens_per_row is not None:
            limits = [min(limits[0], limit) for limit in self.max_new_tokens_per_row]
        call = _Call(
            model=model,
            input_ids_BS=input_ids,
            prompts=strip_padding(input_ids, torch.ones_like(input_ids) if mask is None else mask),
            limits=limits,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            options={name: value for name, value in model_kwargs.items() if name == "logits_to_keep"},
        )
        parts = self._sample_within_memory(call)
        self._kept_rows = {prompt: cache for part in parts for prompt, cache in part.caches.items()}
        rows = {row: (part, i) for part in parts for i, row in enumerate(part.rows)}
        in_order = [rows[row] for row in range(len(input_ids))]
        self.completions = SampledCompletions(
            tokens=[part.tokens[i] for part, i in in_order],
            logps=[part.logps[i] for part, i in in_order],
            is_cut=[part.is_cut[i] for part, i in in_order],
        )
        return _join_sequences(parts, generation_config._pad_token_tensor)

    def _sample_within_memory(self, call: "_Call") -> list["_Part"]:
        """All rows at once; after an out-of-memory error, in two halves, each of which may be halved again.

        Each part begins at the same random state and draws for all rows, so a row gets the same random numbers in any
        part. The random state at the end is that of the part that drew most often.
        """
        generator, rows = _random_numbers(call.device), list(range(len(call.prompts)))
        start = generator.get_rng_state()
        pending = _split_rows(rows, self._max_rows or len(rows))
        parts: list[_Part] = []
        while pending:
            part_rows = pending.pop(0)
            generator.set_rng_state(start)
            try:
                parts.append(self._sample_part(call, part_rows))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part_rows) == 1:
                    raise
            # Outside the handler, whose traceback would keep the tensors of the failed attempt.
            clear_device_cache(garbage_collection=True)
            self._max_rows = -(-len(part_rows) // 2)
            logger.warning(
                "Out of memory: completions are now sampled in parts of %s rows, with the same random numbers.",
                self._max_rows,
            )
            pending = _split_rows(part_rows, self._max_rows) + pending
        generator.set_rng_state(max(parts, key=lambda part: max(map(len, part.tokens))).random_state)
        return parts

    def _sample_part(self, call: "_Call", rows: list[int]) -> "_Part":
        """Sample the completions of some of the rows of a call."""
        model, device, is_whole = call.model, call.device, len(rows) == len(call.prompts)
        batch, logits_RV = self._prefill(call, rows)
        rows_R = None if is_whole else torch.tensor(rows, device=device)
        input_ids, most = call.input_ids_BS, max(call.limits[row] for row in rows)
        # A kept cache is copied at the token at which its row ends, so every token is checked.
        look_every = 1 if device.type == "cpu" or self._keeps_rows else LOOK_EVERY
        how = {"temperature": self.temperature, "do_sample": call.generation_config.do_sample}
        random_states = _RandomStates(device, look_every)
        endings = _Endings(call.limits, rows, device)
        logps: list[Tensor] = []
        finished_caches: dict[int, DynamicCache] = {}
        # LoRA first: `stacked_lora` skips layers whose base has another forward.
        layers = stacked_lora(model), self._unpacker.unpacked(model)
        with model._optimize_model_for_decode(), layers[0], layers[1], self._captured or nullcontext():
            while True:
                tokens_B, logps_B = draw(logits_RV, rows_R, input_ids, call.logits_processor, **how)
                logps.append(logps_B)
                random_states.record()
                tokens_B = tokens_B.where(endings.is_active_B, call.generation_config._pad_token_tensor)
                input_ids = torch.cat([input_ids, tokens_B.unsqueeze(1)], dim=1)
                endings.update(call.stopping_criteria, input_ids)
                if len(logps) % look_every == 0 or len(logps) >= most:
                    is_active = endings.is_active_B.tolist()
                    if self._keeps_rows:
                        ended = [row for row in batch.rows if not is_active[row] and row not in finished_caches]
                        finished_caches |= {row: batch.extract_row(row) for row in ended}
                    if not any(is_active):
                        break
                    batch.drop_finished(is_active)
                logits_RV, rows_R = batch.step(model, tokens_B, **call.options)
        logps_BC = torch.stack(logps, dim=1)
        if not logps_BC.isfinite().all():
            raise RuntimeError(
                "The model returned logits that are NaN or infinite while it sampled. In 16 bits, try float32 "
                "(bf16=False, fp16=False); otherwise look for NaN in the weights of the model and the adapter."
            )
        all_lengths, all_cut = endings.lengths_B.tolist(), endings.is_cut_B.tolist()
        lengths = [all_lengths[row] for row in rows]
        random_states.restore(max(lengths))
        prompt_tokens = call.input_ids_BS.size(1)
        tokens = dict(zip(rows, _truncate(input_ids[rows, prompt_tokens:], lengths), strict=True))
        return _Part(
            rows=rows,
            sequences_BT=input_ids[:, : prompt_tokens + max(lengths)],
            tokens=list(tokens.values()),
            logps=_truncate(logps_BC[rows], lengths),
            is_cut=[all_cut[row] for row in rows],
            # The last token of a row is sampled but not fed to the model.
            caches={call.prompts[row] + tuple(tokens[row][:-1]): cache for row, cache in finished_caches.items()},
            random_state=_random_numbers(device).get_rng_state(),
        )

    def _prefill(self, call: "_Call", rows: list[int]) -> tuple[DecodeBatch, Tensor]:
        """The batch of these rows before its first step, and their first logits, shape (R, V)."""
        prompts, device = [call.prompts[row] for row in rows], call.device
        prefilled = self._kept_prompts
        if prefilled is None or not prefilled.row_of.keys() >= set(prompts):
            prefilled = prefill_prompts(call.model, prompts, device, self._kept_rows, **call.options)
        if len(rows) == len(call.prompts):
            self._kept_prompts = prefilled if self._keeps_prompts else None
            self._kept_rows = {}
        if self._captured is None and device.type == "cuda":
            self._captured = CapturedSteps(capture_cuda_graph)
        run_step = self._captured or (None if device.type == "cpu" else run_uncaptured)
        most = max(call.limits[row] for row in rows)
        batch = start_decoding(call.model, prefilled, call.prompts, rows, max_new_tokens=most, run_step=run_step)
        return batch, prefilled.logits_PV[[prefilled.row_of[prompt] for prompt in prompts]]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of one call of the sampler.

    Attributes:
        prompts: the token ids of each row without padding.
        limits: new tokens that each row may have.
        options: further keyword arguments for the model's forward.
    """

    model: PreTrainedModel
    input_ids_BS: Tensor
    prompts: list[Prompt]
    limits: list[int]
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    options: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.input_ids_BS.device


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The completions of some rows of a call.

    Attributes:
        sequences_BT: prompts and completions of all rows, of which only `rows` count.
        tokens, logps, is_cut: see `SampledCompletions`, in the order of `rows`.
        caches: the kept caches, by the tokens in each.
        random_state: after the last draw of the longest completion.
    """

    rows: list[int]
    sequences_BT: Tensor
    tokens: list[list[int]]
    logps: list[list[float]]
    is_cut: list[bool]
    caches: dict[Prompt, DynamicCache]
    random_state: Tensor


def _join_sequences(parts: list[_Part], pad_token: Tensor) -> Tensor:
    """The sequences of all rows, padded on the right, shape (B, T)."""
    if len(parts) == 1:
        return parts[0].sequences_BT
    longest = max((part.sequences_BT for part in parts), key=lambda sequences_BT: sequences_BT.size(1))
    joined_BT = pad_token.expand_as(longest).clone()
    for part in parts:
        joined_BT[part.rows, : part.sequences_BT.size(1)] = part.sequences_BT[part.rows]
    return joined_BT


def _split_rows(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _random_numbers(device: torch.device) -> Any:
    """The module with the random state of a device."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


class _Endings:
    """Which rows have ended, why, and after how many tokens. All of it stays on the device: only reading it waits.

    Args:
        limits: new tokens that each row may have.
        rows: the rows that are sampled; all others count as ended.
    """

    def __init__(self, limits: list[int], rows: list[int], device: torch.device):
        self._limits_B = torch.tensor(limits, device=device)
        self.lengths_B = torch.zeros_like(self._limits_B)
        self.is_active_B = torch.zeros_like(self._limits_B, dtype=torch.bool)
        self.is_active_B[rows] = True
        self.is_cut_B = torch.zeros_like(self.is_active_B)

    def update(self, criteria: StoppingCriteriaList, input_ids: Tensor) -> None:
        """Take one more token per row into account, the last one of `input_ids`."""
        self.lengths_B += self.is_active_B
        stops_B, cuts_B = _check_stopping(criteria, input_ids)
        cuts_B |= self.lengths_B >= self._limits_B
        self.is_cut_B |= self.is_active_B & cuts_B & ~stops_B
        self.is_active_B &= ~(stops_B | cuts_B)


class _RandomStates:
    """The random states after the last draws. Transformers' loop stops when the last row ends, this one up to
    `look_every - 1` draws later."""

    def __init__(self, device: torch.device, look_every: int):
        self._generator = _random_numbers(device)
        self._draws = 0
        self._states: deque[Tensor] = deque(maxlen=look_every)
        self._is_needed = look_every > 1

    def record(self) -> None:
        """Call this after each draw."""
        self._draws += 1
        if self._is_needed:
            self._states.append(self._generator.get_rng_state())

    def restore(self, draws: int) -> None:
        """Return to the state after the given number of draws."""
        if draws < self._draws:
            self._generator.set_rng_state(self._states[draws - self._draws - 1])


def start_decoding(
    lm: PreTrainedModel,
    prefilled: PrefilledPrompts,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    run_step: StepRunner | None = None,
) -> DecodeBatch:
    """A batch of rows that continue these prompts; `prompts[i]` is the prompt of row i.

    Args:
        rows: the rows to continue.
        run_step: runs each step, in buffers of fixed size. If it is None, or the model does not allow that, the cache
            grows.
    """
    rows_of: dict[Prompt, list[int]] = {}
    for row in rows:
        rows_of.setdefault(prompts[row], []).append(row)
    is_plain = can_share_slot(lm, prefilled.caches[0])
    width = siblings_per_slot(list(rows_of), max_new_tokens) if is_plain else 1
    slots = [slot for siblings in rows_of.values() for slot in _split_rows(siblings, width)]
    sources = [prefilled.row_of[prompts[slot[0]]] for slot in slots]
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=prefilled.logits_PV.device)
    if run_step is None or not is_plain:
        return DecodeBatch(prefilled.caches, sources, slots, lengths_B)
    return FixedDecodeBatch(prefilled.caches, sources, slots, lengths_B, max_new_tokens=max_new_tokens, run=run_step)


def siblings_per_slot(prompts: Sequence[Prompt], max_new_tokens: int) -> int:
    """The number of siblings that share a slot of the cache: together, their completions are no longer than the
    shortest prompt.

    A shared slot stores and reads its prompt once instead of once per row, but each sibling also attends over the
    masked tokens of the others.
    """
    return max(1, min(map(len, prompts)) // max_new_tokens)


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


def _truncate(values_BC: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values_BC.tolist(), lengths, strict=True)]
