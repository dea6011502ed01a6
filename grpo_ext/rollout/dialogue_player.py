"""Play dialogues as a rollout of TRL: all rows at once, each continuing from its own KV cache."""

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
    `dialogue/errors`, the number of episodes whose environment raised.

    Attributes:
        sampler: sampler of the run; must share prompts.
        turns: turns the text of an environment into tokens.
        max_tokens: maximum tokens of an episode after the first observation.
        eos_token_id: the only token of prompt and completion if the environment fails to start.
        record: records the metrics.
        gather: concatenates the rows of all processes.
        device: device on which metrics are gathered.
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
        """The output of a `rollout_func`, with the column that `dialogue_reward` reads; and which rows were cut off.

        Args:
            examples: rows of the dataset.
            generate: samples one completion per history of token ids.
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
