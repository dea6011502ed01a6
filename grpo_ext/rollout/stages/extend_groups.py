"""Extend groups whose rewards are all equal, until the rewards differ or the group reaches its limit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_ext import refusals
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.losses.subset import max_variance_subset
from grpo_ext.rollout.collect import Draw, Record, StageContext
from grpo_ext.rollout.types import Rollout


@dataclass(frozen=True, kw_only=True)
class ExtendGroups:
    """The stage of `num_generations_max`: samples more completions for dead groups, up to G at a time.

    If a group becomes mixed, the G completions whose rewards differ most are trained on (`losses/subset.py`), with the
    mean and deviation of all its completions. Metrics: `growth/groups`, the number of groups that were dead after G
    completions, and `growth/alive`, the number of those that became mixed.

    Attributes:
        limit: maximum completions per prompt, more than G.
        group_size: G.
        total: combines the rewards of all functions into one reward per row, shape (..., F) -> (...).
        keep_prompt_caches: creates a context in which the last prefilled prompts are not prefilled again.
        record: records the metrics.
        process, processes: index of this process, and the number of processes; each has whole groups.
    """

    limit: int
    group_size: int
    total: Callable[[Tensor], Tensor]
    keep_prompt_caches: Callable[[], AbstractContextManager[None]]
    record: Record
    process: int = 0
    processes: int = 1

    @classmethod
    def build(cls, context: StageContext) -> "ExtendGroups | None":
        """The stage of a run; None if its settings do not enable it.

        Raises:
            ValueError: the stage is not possible in this run.
        """
        args = context.args
        if args.num_generations_max is None:
            return None
        refusals.refuse_interleaved(f"num_generations_max={args.num_generations_max}", context.interleaved)
        refusals.refuse_extension(args, samples_shared=context.sampler.is_shared)
        return cls(
            limit=args.num_generations_max,
            group_size=args.num_generations,
            total=context.total_rewards,
            keep_prompt_caches=context.sampler.keep_prompt_caches,
            record=context.record,
            process=context.process,
            processes=context.processes,
        )

    def __call__(self, examples: list[dict[str, Any]], draw: Draw) -> Rollout:
        with self.keep_prompt_caches():
            return self._extend(examples, draw(examples), draw)

    def _extend(self, examples: list[dict[str, Any]], rollout: Rollout, draw: Draw) -> Rollout:
        """Legend: P groups of all processes, M = `limit`, F reward functions."""
        G, groups = self.group_size, len(examples) // self.group_size  # groups per process
        first_group = self.process * groups
        completions = [rollout.completions[i * G : (i + 1) * G] for i in range(groups)]
        rewards_PMF = _pad_with_nan(rollout.rewards_BF.unflatten(0, (-1, G)), self.limit)
        sampled, extended = G, set[int]()
        while sampled < self.limit:
            dead = (~mixed_groups(self.total(rewards_PMF))).nonzero().flatten().tolist()
            dead_by_process = [[i for i in dead if i // groups == process] for process in range(self.processes)]
            # Every process samples for the same number of groups; rows that only fill up this number are not used.
            slots = max(map(len, dead_by_process))
            if slots == 0:
                break
            extra = min(G, self.limit - sampled)
            mine = dead_by_process[self.process]
            mine = mine + [first_group] * (slots - len(mine))
            more = draw([examples[(i - first_group) * G] for i in mine for _ in range(extra)])
            for group, start in _first_rows(dead_by_process, slots, extra):
                rewards_PMF[group, sampled : sampled + extra] = more.rewards_BF[start : start + extra]
                if group // groups == self.process:
                    here = start - more.first_row
                    completions[group - first_group] += more.completions[here : here + extra]
            extended |= set(dead)
            sampled += extra
        rollout.all_rewards_PM = self.total(rewards_PMF)
        rollout.sampled_PM = [rollout.all_rewards_PM.clone()]
        revived = extended & set(mixed_groups(rollout.all_rewards_PM).nonzero().flatten().tolist())
        self.record("growth/groups", float(len(extended)))
        self.record("growth/alive", float(len(revived)))
        for group in revived:
            chosen = max_variance_subset(rollout.all_rewards_PM[group], G)
            kept = [completions[group - first_group][i] for i in chosen] if group // groups == self.process else []
            rollout.replace_group(group, kept, rewards_PMF[group, chosen], rollout.all_rewards_PM[group])
        return rollout


def _pad_with_nan(rewards_PGF: Tensor, limit: int) -> Tensor:
    """Pad the rewards to `limit` completions, for those that are not sampled yet."""
    P, G, F = rewards_PGF.shape
    return torch.cat([rewards_PGF, rewards_PGF.new_full((P, limit - G, F), torch.nan)], dim=1)


def _first_rows(dead_by_process: list[list[int]], slots: int, extra: int) -> Iterator[tuple[int, int]]:
    """Each dead group, and its first row among the rows that all processes sampled."""
    for process, dead in enumerate(dead_by_process):
        for slot, group in enumerate(dead):
            yield group, (process * slots + slot) * extra
