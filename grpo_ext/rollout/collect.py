"""Collect a rollout before TRL processes it: sample, compute rewards, and let each stage change the result.

    rollout = collect(examples, draw, [ExtendGroups(...), Resample(...), Replay(...)])

TRL samples, runs the old and reference passes, and computes rewards last. A stage needs the rewards first, and may
sample several times. TRL's own method then processes the rollout as if it had been sampled in one call.

Legend: P prompts, G completions per prompt, M completions sampled per prompt, B rows, C completion tokens, F reward
functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.advantages import group_kind_shares
from grpo_ext.rollout.pools import DifficultyPools
from grpo_ext.rollout.sampler import CompletionSampler
from grpo_ext.rollout.types import Completion, Rollout


class Draw(Protocol):
    """Samples completions for these rows of the dataset and computes their rewards.

    Rows with the same prompt are adjacent. Every process makes the same number of calls, with the same number of rows.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> Rollout: ...


class RolloutStage(Protocol):
    """Samples a rollout with `draw`, which includes the stages before this one, and returns it, changed or not.

    A stage wraps `draw` instead of running after it: extending groups needs the prompt caches of the first call, and
    resampled groups must be extended as well.
    """

    def __call__(self, examples: list[dict[str, Any]], draw: Draw) -> Rollout: ...


class Record(Protocol):
    """Adds a value to the metric of this name; metrics are averaged over a logging step."""

    def __call__(self, name: str, value: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a run gives to its stages.

    Attributes:
        args: settings of the run.
        sampler: sampler of the run.
        record: records training metrics.
        total_rewards: combines the rewards of all functions into one reward per row, shape (..., F) -> (...).
        score: returns log-probs of completions under the current policy, and their mask, shapes (B, C).
        dataset: returns the current training data.
        step: returns the number of optimizer steps so far.
        pools: chooses the problems of a rollout; None if the data loader does.
        interleaved: names of the features of this run that TRL interleaves with sampling; no stage works with them.
        process, processes: index of this process, and the number of processes.
    """

    args: GRPOExtConfig
    sampler: CompletionSampler
    record: Record
    total_rewards: Callable[[Tensor], Tensor]
    score: Callable[[list[Completion]], tuple[Tensor, Tensor]]
    dataset: Callable[[], Dataset | IterableDataset]
    step: Callable[[], int]
    pools: DifficultyPools | None = None
    interleaved: Sequence[str] = ()
    process: int = 0
    processes: int = 1


def collect(examples: list[dict[str, Any]], draw: Draw, stages: Sequence[RolloutStage]) -> Rollout:
    """The rollout for these rows of the dataset, as the last stage returns it."""
    for stage in stages:
        draw = partial(stage, draw=draw)
    return draw(examples)


def record_group_kinds(record: Record, sampled_PM: list[Tensor], attainable_reward: float) -> None:
    """Record the shares of the sampled groups that are mixed, all right, all wrong, and dead.

    Args:
        attainable_reward: the total reward of a perfect completion, as far as known.
    """
    shares = group_kind_shares(torch.cat(sampled_PM), attainable_reward)
    for kind, share in shares.items():
        record(f"frac_groups/{kind}", share)
    record("frac_dead_groups", 1.0 - shares["mixed"])
