"""Replace dead groups with groups for other prompts."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import IterableDataset

from grpo_ext import refusals
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.rollout.collect import Draw, Record, StageContext
from grpo_ext.rollout.pools import DifficultyPools
from grpo_ext.rollout.types import Rollout


@dataclass(kw_only=True)
class Resample:
    """The stage of `dead_groups="resample"`: each round samples one group on another prompt per dead group.

    Groups that are still dead after the last round stay. Metric: `resampled_groups`, the number of replaced groups.

    Attributes:
        max_rounds: at least 1.
        group_size: G.
        whole_groups: whether each group must be sampled by a single process.
        dataset: returns the current training data.
        step: returns the optimizer step of the rollout.
        seed: the same on every process. Seed and step determine the prompts, so a resumed run samples the same ones.
        record: records the metric.
        pools: chooses the prompts; None for random ones.
        process, processes: index of this process, and the number of processes.
    """

    max_rounds: int
    group_size: int
    whole_groups: bool
    dataset: Callable[[], Dataset]
    step: Callable[[], int]
    seed: int
    record: Record
    pools: DifficultyPools | None = None
    process: int = 0
    processes: int = 1
    _rollout_of_step: tuple[int, int] = field(default=(-1, 0), init=False)  # the step, and its earlier rollouts

    @classmethod
    def build(cls, context: StageContext) -> "Resample | None":
        """The stage of a run; None if its settings do not enable it.

        Raises:
            ValueError: the stage is not possible in this run.
        """
        args = context.args
        if args.dead_groups != "resample":
            return None
        refusals.refuse_interleaved("dead_groups='resample'", context.interleaved)
        refusals.refuse_streamed_resampling(is_streamed=isinstance(context.dataset(), IterableDataset))
        return cls(
            max_rounds=args.max_resample_rounds,
            group_size=args.num_generations,
            whole_groups=args.num_generations_max is not None,
            dataset=context.dataset,
            step=context.step,
            seed=args.seed,
            record=context.record,
            pools=context.pools,
            process=context.process,
            processes=context.processes,
        )

    def __call__(self, examples: list[dict[str, Any]], draw: Draw) -> Rollout:
        rollout = draw(examples)
        G, dataset = self.group_size, self.dataset()
        prompts, resampled = self._random_prompts(), 0
        for _ in range(self.max_rounds):
            dead = (~mixed_groups(rollout.all_rewards_PM)).nonzero().flatten().tolist()
            if not dead:
                break
            # Every process samples the same number of rows, so there may be more new groups than dead ones.
            groups, unit = len(dead), 1 if self.whole_groups else G
            while groups * unit % self.processes:
                groups += 1
            rows = range(len(dataset))
            if self.pools is not None:
                chosen = self.pools.choose_more(groups)
            else:
                chosen = prompts.sample(rows, groups) if groups <= len(rows) else prompts.choices(rows, k=groups)
            drawn = [dataset[i] for i in chosen]
            fresh_rows = [dict(example) for example in drawn for _ in range(G)]
            per_process = len(fresh_rows) // self.processes
            fresh = draw(fresh_rows[self.process * per_process : (self.process + 1) * per_process])
            rollout.sampled_PM += fresh.sampled_PM
            completions = gather_object(fresh.completions)
            mixed = mixed_groups(fresh.all_rewards_PM).nonzero().flatten().tolist()
            for place, group in zip(dead, mixed, strict=False):
                of_group = slice(group * G, (group + 1) * G)
                rollout.replace_group(
                    place, completions[of_group], fresh.rewards_BF[of_group], fresh.all_rewards_PM[group]
                )
                resampled += 1
        self.record("resampled_groups", float(resampled))
        return rollout

    def _random_prompts(self) -> random.Random:
        """A random generator with the same state on every process, and in a resumed run."""
        step, rollouts = self._rollout_of_step
        rollouts = rollouts + 1 if step == self.step() else 0
        self._rollout_of_step = self.step(), rollouts
        return random.Random(f"{self.seed} {self.step()} {rollouts}")
