"""Plays dialogues as a rollout of TRL: every row of a rollout at once, each continuing from its own KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_ext.engine.decode import SampledCompletions
from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.collect import Record
from grpo_ext.rollout.dialogue import Dialogue
from grpo_ext.rollout.sampler import CompletionSampler


@dataclass(frozen=True, kw_only=True)
class DialoguePlayer:
    """Plays a `Dialogue` with the policy. Metrics: `dialogue/turns`, turns of the model per episode, and
    `dialogue/errors`, episodes whose environment raised.

    Attributes:
        sampler: shared.
        turns: how the text of an environment becomes tokens.
        max_tokens: per episode, after the first words of the environment.
        eos_token_id: stands for an environment that could not begin.
        record: takes the metrics.
        gather: concatenates the rows of all processes.
        device: of the metrics.
    """

    sampler: CompletionSampler
    turns: TurnTokenizer
    max_tokens: int
    eos_token_id: int
    record: Record
    gather: Callable[[Tensor], Tensor]
    device: torch.device

    def __call__(
        self,
        dialogue: Dialogue,
        examples: list[dict[str, Any]],
        generate: Callable[[list[list[int]]], SampledCompletions],
    ) -> tuple[dict[str, list[Any]], list[bool]]:
        """What TRL expects of a `rollout_func`, with the column of `dialogue_reward`; and which rows were cut off.

        Args:
            examples: rows of the dataset.
            generate: one completion for each history of token ids.
        """

        def draw(histories: list[list[int]], limits: Sequence[int]) -> SampledCompletions:
            with self.sampler.limited(limits):
                return generate(histories)

        with self.sampler.keep_row_caches():
            episodes = dialogue.play(
                examples, self.turns, draw, max_tokens=self.max_tokens, eos_token_id=self.eos_token_id
            )
        counts = [[episode.turns, episode.error is not None] for episode in episodes]
        counts_B2 = self.gather(torch.tensor(counts, dtype=torch.float, device=self.device))
        self.record("dialogue/turns", counts_B2[:, 0].mean().item())
        self.record("dialogue/errors", counts_B2[:, 1].sum().item())
        output: dict[str, list[Any]] = {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": [episode.logps for episode in episodes],
            "env_mask": [episode.is_own for episode in episodes],
            "episode_reward": [episode.reward for episode in episodes],
        }
        return output, [episode.is_cut for episode in episodes]
