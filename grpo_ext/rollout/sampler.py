"""The sampler of a run: siblings share the prefill of their prompt, and log-probs and cut-offs are recorded.

It runs inside `generate` of transformers (`engine/decode.py`) and samples the tokens that transformers' own loop would
sample from the same random state. If something else samples, such as vLLM, a `rollout_func` or a user's override,
nothing but the tokens is known about its completions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.install import shared_sampling

TokenRows = list[list[int]]
Sampled = tuple[TokenRows, list[list[float]] | None, list[bool] | None]


class CompletionSampler:
    """Samples completions with shared prompts. The trainer uses it only if `is_shared`.

    Args:
        is_shared: whether the model and the settings allow shared sampling.
        temperature: temperature at the start of the run.
        stop_strings: strings that end a completion.
        tokenizer: used to detect stop strings.
    """

    def __init__(
        self,
        *,
        is_shared: bool,
        temperature: float,
        stop_strings: list[str],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.is_shared, self.stop_strings = is_shared, stop_strings
        self._tokenizer = tokenizer
        self._engine = GroupSampler(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of log-probs; tokens are sampled at that of the generation config."""
        self._engine.temperature = temperature

    def keep_prompt_caches(self) -> AbstractContextManager[None]:
        """A context in which prompts of the last call are not prefilled again. The weights must not change."""
        return self._engine.keep_prompt_caches()

    def keep_row_caches(self) -> AbstractContextManager[None]:
        """A context in which rows of the last call continue from their caches. The weights must not change."""
        return self._engine.keep_row_caches()

    @contextmanager
    def limited(self, max_new_tokens: Sequence[int]) -> Iterator[None]:
        """A context with a limit on the new tokens of each row of a call."""
        self._engine.max_new_tokens_per_row = max_new_tokens
        try:
            yield
        finally:
            self._engine.max_new_tokens_per_row = None

    def sample(self, lm: PreTrainedModel, generate: Callable[[], tuple[TokenRows, Any]]) -> Sampled:
        """Completions, their log-probs (nats), and whether each was cut off.

        If something other than this sampler produced the completions, for example an override of `model.generate`, the
        log-probs are what it returned, and the third value is None.

        Args:
            lm: the causal language model that `generate` calls.
            generate: TRL's `_generate_single_turn`, with its arguments.
        """
        self._engine.completions = None
        with shared_sampling(lm, self._engine, self.stop_strings, self._tokenizer):
            completion_ids, logps = generate()
        sampled, self._engine.completions = self._engine.completions, None
        if sampled is None or not _begin_with(sampled.tokens, completion_ids):
            return completion_ids, logps, None
        lengths = [min(len(ids), len(tokens)) for ids, tokens in zip(completion_ids, sampled.tokens, strict=True)]
        return _first_tokens(sampled.tokens, lengths), _first_tokens(sampled.logps, lengths), sampled.is_cut


def _begin_with(tokens: TokenRows, completion_ids: TokenRows) -> bool:
    """Whether TRL's rows are the sampled rows, up to the end of the shorter one."""
    return len(tokens) == len(completion_ids) and all(
        ids[: len(row)] == row[: len(ids)] for ids, row in zip(completion_ids, tokens, strict=True)
    )


def _first_tokens(rows: list[list[Any]], lengths: list[int]) -> list[list[Any]]:
    """Each row, truncated to its length."""
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def ending_metrics(lengths: list[int], is_cut: list[bool], accelerator: Accelerator) -> dict[str, float]:
    """TRL's metrics of terminated completions, over all processes; here, a stop string also terminates a completion.

    Args:
        lengths: tokens of each completion of this process that the model wrote.
        is_cut: whether each was cut off.
    """
    lengths_B = accelerator.gather(torch.tensor(lengths, device=accelerator.device)).float()
    is_cut_B = accelerator.gather(torch.tensor(is_cut, device=accelerator.device))
    ended = lengths_B[~is_cut_B] if not is_cut_B.all() else lengths_B.new_zeros(1)
    metrics = {
        "clipped_ratio": is_cut_B.float().mean(),
        "mean_terminated_length": ended.mean(),
        "min_terminated_length": ended.min(),
        "max_terminated_length": ended.max(),
    }
    return {name: value.item() for name, value in metrics.items()}
