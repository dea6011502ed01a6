"""The values that travel from sampling to the loss: completions, and the rollout that they form.

Legend: P prompts, G completions per prompt, B = P*G rows, F reward functions, M completions sampled for a prompt, at
least G.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One row of a rollout.

    Attributes:
        example: the row of the dataset, with its `prompt`.
        prompt_ids, completion_ids: token ids, as TRL's `_generate` returns them.
        completion: text or messages, as reward functions see it.
        logps: log-probs of the completion's tokens under the policy that sampled them at `temperature` (nats); None if
            the sampler does not report them.
        is_cut: whether it ended because no more tokens were allowed; None if the sampler does not report it.
        temperature: the temperature that it was sampled at.
        extra: values that reward functions logged for it (`log_extra`).
    """

    example: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logps: list[float] | None
    is_cut: bool | None
    temperature: float
    extra: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """What is known about the rows of this process when they are scored.

    Attributes:
        temperatures: the temperature that each row was sampled at.
        logps: log-probs at sampling, row by row; None if they are not those of the policy's own tokens.
        is_cut: whether each row ended because no more tokens were allowed; None if the sampler does not report it.
        is_replayed: whether an earlier policy sampled the row.
    """

    temperatures: list[float]
    logps: list[list[float]] | None
    is_cut: list[bool] | None
    is_replayed: list[bool]


@dataclass(kw_only=True)
class Rollout:
    """Completions with their rewards, the rows of a group next to each other.

    Attributes:
        completions: the rows of this process.
        first_row: index of its first row among the rows of all processes.
        rewards_BF: rewards of the rows of all processes; NaN if a function did not score a row.
        all_rewards_PM: total reward of every completion that was sampled for each group's prompt, including those that
            are not among the rows; NaN if there is none or nothing scored it.
        sampled_PM: `all_rewards_PM` of every group that was sampled on the way, including those that were replaced.
        replayed: groups that an earlier policy sampled.
    """

    completions: list[Completion]
    first_row: int
    rewards_BF: Tensor
    all_rewards_PM: Tensor
    sampled_PM: list[Tensor]
    replayed: set[int] = field(default_factory=set)

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.rewards_BF) // len(self.all_rewards_PM)

    def replace_group(
        self, group: int, completions: list[Completion], rewards_GF: Tensor, all_rewards_M: Tensor
    ) -> None:
        """Replace a group; `completions` may be empty if this process has none of its rows."""
        G = self.group_size
        self.rewards_BF[group * G : (group + 1) * G] = rewards_GF
        self.all_rewards_PM[group] = all_rewards_M
        for row, completion in enumerate(completions, start=group * G - self.first_row):
            if 0 <= row < len(self.completions):
                self.completions[row] = completion

    def sampled_rows(self) -> SampledRows:
        """What the scoring passes need to know about the rows."""
        logps = [completion.logps for completion in self.completions if completion.logps is not None]
        endings = [completion.is_cut for completion in self.completions if completion.is_cut is not None]
        rows, G = len(self.completions), self.group_size
        return SampledRows(
            temperatures=[completion.temperature for completion in self.completions],
            logps=logps if len(logps) == rows else None,
            is_cut=endings if len(endings) == rows else None,
            is_replayed=[(self.first_row + row) // G in self.replayed for row in range(rows)],
        )
