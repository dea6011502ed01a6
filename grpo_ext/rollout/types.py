"""A rollout that is put together before TRL works on it: answers, their rewards, and what else was drawn for them.

Legend: P prompts, G completions per prompt, B = P*G rows, F reward functions, M answers drawn to a prompt, G or more.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row of a rollout.

    Attributes:
        example: the row of the data set, with its `prompt`.
        prompt_ids, completion_ids: as TRL's `_generate` gives them.
        completion: text or messages, what reward functions see.
        logps: of the completion's tokens, under the policy that drew them at `temperature` (nats); None where the
            sampler does not say.
        is_cut: whether it ended because no more tokens were allowed; None where the sampler does not say.
        temperature: that it was drawn at.
        extra: what reward functions logged beside.
    """

    example: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logps: list[float] | None
    is_cut: bool | None
    temperature: float
    extra: dict[str, Any]


@dataclass(kw_only=True)
class Rollout:
    """The rows that TRL is to work on, groups next to each other.

    Attributes:
        answers: the rows of this process.
        first: the place of its first row among those of all processes.
        rewards_BF: of the rows of all processes; NaN where a function did not judge.
        all_rewards_PM: the total reward of every answer that was drawn to a group's prompt, those that are not among
            the rows too; NaN where there is none or nobody judged it.
        replayed: groups that an earlier policy drew.
    """

    answers: list[Answer]
    first: int
    rewards_BF: Tensor
    all_rewards_PM: Tensor
    replayed: set[int] = field(default_factory=set)

    def put(self, group: int, answers: list[Answer], rewards_GF: Tensor, drawn_M: Tensor) -> None:
        """Replace a group; `answers` may be empty where this process has none of its rows."""
        G = len(rewards_GF)
        self.rewards_BF[group * G : (group + 1) * G] = rewards_GF
        self.all_rewards_PM[group] = drawn_M
        for row, answer in enumerate(answers, start=group * G - self.first):
            if 0 <= row < len(self.answers):
                self.answers[row] = answer

    def is_replayed(self, num_generations: int) -> list[bool]:
        """Of each row of this process, whether an earlier policy drew it."""
        return [(self.first + row) // num_generations in self.replayed for row in range(len(self.answers))]
