"""The values passed from sampling to the loss: completions, and the rollout that they form.

Legend: P prompts, G completions per prompt, B = P*G rows, F reward functions, M >= G completions sampled per prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
        is_cut: whether it was ended by the limit on tokens; None if the sampler does not report it.
        temperature: sampling temperature.
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
        completion_ids: token ids of each completion.
        temperatures: sampling temperature of each row.
        logps: log-probs at sampling, row by row; None if they are unknown, or if rows include tokens that the policy
            did not sample.
        is_cut: whether each row was ended by the limit on tokens; None if the sampler does not report it.
        is_replayed: whether each row was sampled by an earlier policy.
    """

    completion_ids: list[list[int]]
    temperatures: list[float]
    logps: list[list[float]] | None
    is_cut: list[bool] | None
    is_replayed: list[bool]

    def are_rows_of(self, completion_ids_BC: Tensor, mask_BC: Tensor) -> bool:
        """Whether these padded completions are the rows; any of them may be masked completely."""
        if len(completion_ids_BC) != len(self.completion_ids):
            return False
        padded = zip(completion_ids_BC.tolist(), mask_BC.sum(dim=1).tolist(), self.completion_ids, strict=True)
        return all(tokens == 0 or ids[:tokens] == own for ids, tokens, own in padded)


@dataclass(kw_only=True)
class Rollout:
    """Completions with their rewards; the rows of a group are adjacent.

    Attributes:
        completions: the rows of this process.
        first_row: index of its first row among the rows of all processes.
        rewards_BF: rewards of the rows of all processes; NaN if a function did not score a row.
        all_rewards_PM: total rewards of all completions sampled for the prompt of each group, including those that are
            not among the rows; NaN if there is no such completion or no function scored it.
        sampled_PM: `all_rewards_PM` of all groups sampled for this rollout, including those that were replaced.
        replayed: indices of groups that an earlier policy sampled.
    """

    completions: list[Completion]
    first_row: int
    rewards_BF: Tensor
    all_rewards_PM: Tensor
    sampled_PM: list[Tensor]
    replayed: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        examples: list[dict[str, Any]],
        generated: tuple[Any, ...],
        rows: SampledRows,
        extra: dict[str, list[Any]],
        *,
        rewards_BF: Tensor,
        all_rewards_PM: Tensor,
        first_row: int,
    ) -> "Rollout":
        """A rollout as it was sampled.

        Args:
            examples: rows of the dataset.
            generated: what TRL's `_generate` returned for them.
            rows: what the sampler reports about them.
            extra: columns that reward functions logged.
            rewards_BF, all_rewards_PM, first_row: see the attributes.
        """
        prompt_ids, completion_ids, _, completions, logps, *_ = generated
        sampled = [
            Completion(
                example=example,
                prompt_ids=prompt_ids[i],
                completion_ids=completion_ids[i],
                completion=completions[i],
                logps=None if logps is None else logps[i],
                is_cut=None if rows.is_cut is None else rows.is_cut[i],
                temperature=rows.temperatures[i],
                extra={column: values[i] for column, values in extra.items()},
            )
            for i, example in enumerate(examples)
        ]
        return cls(
            completions=sampled,
            first_row=first_row,
            rewards_BF=rewards_BF,
            all_rewards_PM=all_rewards_PM,
            sampled_PM=[all_rewards_PM.clone()],
        )

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

    def as_generated(self) -> tuple[Any, ...]:
        """The rows of this process as TRL's `_generate` returns them."""
        rows = self.completions
        return (
            [row.prompt_ids for row in rows],
            [row.completion_ids for row in rows],
            None,
            [row.completion for row in rows],
            _all_or_none(row.logps for row in rows),
            {},
            None,
            [],
        )

    def sampled_rows(self) -> SampledRows:
        """What the scoring passes need to know about the rows."""
        rows, G = self.completions, self.group_size
        return SampledRows(
            completion_ids=[row.completion_ids for row in rows],
            temperatures=[row.temperature for row in rows],
            logps=_all_or_none(row.logps for row in rows),
            is_cut=_all_or_none(row.is_cut for row in rows),
            is_replayed=[(self.first_row + i) // G in self.replayed for i in range(len(rows))],
        )


@dataclass(kw_only=True)
class RolloutInProgress:
    """What TRL's rollout method does not pass from one of its hooks to the next.

    Attributes:
        examples: rows of the dataset.
        is_training: whether the rollout is for an update, rather than for an evaluation.
        rollout: the rollout collected by the stages; None if TRL's method samples.
        rows: what the scoring passes need to know about the rows; None before they are sampled.
        is_cut: whether each row was ended by the limit on tokens; None if the sampler does not report it.
        ref_hidden_BCH: last hidden states of the reference, if requested.
        rewards_BF: rewards of the rows of all processes; None before they are computed.
        scored_examples, completion_ids: rows and completions as reward functions saw them.
        extra_columns: columns that reward functions logged.
    """

    examples: list[dict[str, Any]]
    is_training: bool
    rollout: Rollout | None = None
    rows: SampledRows | None = None
    is_cut: list[bool] | None = None
    ref_hidden_BCH: Tensor | None = None
    rewards_BF: Tensor | None = None
    scored_examples: list[dict[str, Any]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    extra_columns: list[str] = field(default_factory=list)

    def scored(self, examples: list[dict[str, Any]], completion_ids: list[list[int]], extra: list[str]) -> None:
        """Store the rows that reward functions saw, and the columns that they logged."""
        self.scored_examples, self.completion_ids, self.extra_columns = examples, completion_ids, extra


def _all_or_none(values: Iterable[Any]) -> list[Any] | None:
    """The values, or None if any of them is None."""
    listed = list(values)
    return None if any(value is None for value in listed) else listed


def padded_logps(rows: Sequence[Sequence[float]], *, like: Tensor) -> Tensor:
    """Log-probs in float32, padded with 0 on the right to the shape of `like`, (B, C), on its device."""
    padded_BC = torch.zeros(like.shape)
    for row, logps in zip(padded_BC, rows, strict=True):
        row[: len(logps)] = torch.tensor(logps)
    return padded_BC.to(like.device)
