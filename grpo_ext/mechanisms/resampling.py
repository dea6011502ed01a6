"""TRL's trainer with dead groups that are drawn anew, on other prompts."""

import random
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import IterableDataset

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.mechanisms.growth import GrowthTrainer
from grpo_ext.rollout.types import Rollout


class ResamplingTrainer(GrowthTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `dead_groups="resample"`: the places of dead groups go to groups on other prompts, drawn at random from the data
      set, in at most `max_resample_rounds` rounds; what is dead then stays. TRL then works on the full rollout as if it
      had been drawn at once. Metric: `resampled_groups`, places that went to another prompt.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._rollout_of_step = (-1, 0)  # the optimizer step and how many rollouts it has had
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        if args.dead_groups != "resample":
            return
        self._collect_for("dead_groups='resample'")
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "dead_groups='resample' draws prompts at random, and a streamed data set (IterableDataset) has none "
                "to choose from. Load it whole, or use dead_groups='keep' or 'skip'."
            )

    def _collect(self, inputs: list[dict[str, Any]]) -> Rollout:
        """Draw rounds until no group is dead or no round is left."""
        rollout = super()._collect(inputs)
        if self.args.dead_groups != "resample":
            return rollout
        G, world, rank = self.num_generations, self.accelerator.num_processes, self.accelerator.process_index
        draw, resampled = self._random_prompts(), 0
        for _ in range(self.args.max_resample_rounds):
            dead = (~mixed_groups(rollout.all_rewards_PM)).nonzero().flatten().tolist()
            if not dead:
                break
            # As many rows in each process, whole groups where they may grow: more groups, maybe, than there are places.
            groups, share = len(dead), 1 if self.args.num_generations_max else G
            while groups * share % world:
                groups += 1
            indices = range(len(self.train_dataset))
            fresh_indices = draw.sample(indices, groups) if groups <= len(indices) else draw.choices(indices, k=groups)
            examples = [self.train_dataset[i] for i in fresh_indices]
            rows = [dict(example) for example in examples for _ in range(G)]
            fresh = self._draw(rows[rank * len(rows) // world : (rank + 1) * len(rows) // world])
            self._counted.append(fresh.all_rewards_PM)
            answers = gather_object(fresh.answers)
            alive = mixed_groups(fresh.all_rewards_PM).nonzero().flatten().tolist()
            for place, group in zip(dead, alive, strict=False):
                of_group = slice(group * G, (group + 1) * G)
                rollout.put(place, answers[of_group], fresh.rewards_BF[of_group], fresh.all_rewards_PM[group])
                resampled += 1
        self._metrics["train"]["resampled_groups"].append(float(resampled))
        return rollout

    def _random_prompts(self) -> random.Random:
        """The same on every process, and in a run that is resumed."""
        step, rollouts = self._rollout_of_step
        rollouts = rollouts + 1 if step == self.state.global_step else 0
        self._rollout_of_step = self.state.global_step, rollouts
        return random.Random(f"{self.args.seed} {self.state.global_step} {rollouts}")
