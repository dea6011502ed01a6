"""Rollouts that are put together before TRL works on them: sample, compute rewards, let each stage change the result.

    rollout = collect(examples, draw, [ExtendGroups(...), Resample(...), Replay(...)])

TRL samples, runs the old and reference passes, and computes rewards only then. A stage looks at rewards first, and
samples as often as it needs to; TRL's own method then works on the rollout as if it had been sampled at once.

Legend: P prompts, G completions per prompt, M completions sampled for a prompt.
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
from grpo_ext.rollout.sampler import CompletionSampler
from grpo_ext.rollout.types import Completion, Rollout


class Draw(Protocol):
    """Samples completions for these rows of the dataset and computes their rewards.

    Rows with the same prompt are neighbours. Every process calls it equally often, with the same number of rows.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> Rollout: ...


class RolloutStage(Protocol):
    """Draws a rollout with `draw`, which includes the stages before it, and returns it, changed or not.

    It wraps the drawing instead of following it: extending groups needs the prompt caches of the first draw, and what
    is resampled must be extended, too.
    """

    def __call__(self, examples: list[dict[str, Any]], draw: Draw) -> Rollout: ...


class Record(Protocol):
    """Adds a value to the metric of this name; metrics are averaged over a logging step."""

    def __call__(self, name: str, value: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a run gives to its stages.

    Attributes:
        args: its settings.
        sampler: its sampler.
        record: takes metrics of training.
        total_rewards: the reward of each row from those of the reward functions, shape (..., F) -> (...).
        score: log-probs of completions under the policy as it is now, with their mask, shapes (B, C).
        dataset: the training data, at the time of the call.
        step: optimizer steps so far.
        interleaved: what of this run TRL interleaves with sampling, by name; no stage works with it.
        process, processes: index of this process, and their number.
    """

    args: GRPOExtConfig
    sampler: CompletionSampler
    record: Record
    total_rewards: Callable[[Tensor], Tensor]
    score: Callable[[list[Completion]], tuple[Tensor, Tensor]]
    dataset: Callable[[], Dataset | IterableDataset]
    step: Callable[[], int]
    interleaved: Sequence[str] = ()
    process: int = 0
    processes: int = 1


def collect(examples: list[dict[str, Any]], draw: Draw, stages: Sequence[RolloutStage]) -> Rollout:
    """The rollout for these rows of the dataset, as the last of the stages returns it."""
    for stage in stages:
        draw = partial(stage, draw=draw)
    return draw(examples)


def record_group_kinds(record: Record, sampled_PM: list[Tensor], attainable_reward: float) -> None:
    """Record the shares of the sampled groups that are mixed, all right, all wrong, and dead.

    Args:
        attainable_reward: the total reward of a perfect completion, as far as it is known.
    """
    shares = group_kind_shares(torch.cat(sampled_PM), attainable_reward)
    for kind, share in shares.items():
        record(f"frac_groups/{kind}", share)
    record("frac_dead_groups", 1.0 - shares["mixed"])
