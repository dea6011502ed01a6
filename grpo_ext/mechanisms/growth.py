"""TRL's trainer with groups that grow while all their rewards are equal."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.losses.subset import max_variance_subset
from grpo_ext.mechanisms.rounds import RoundsTrainer
from grpo_ext.rollout.types import Rollout


class GrowthTrainer(RoundsTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `num_generations_max`: to prompts whose answers are all worth the same, more are drawn, as many again as a group
      has, on the states of the prompt that the sampler kept. Of a group that came alive, the answers whose rewards
      differ most are trained on (`losses/subset.py`), with advantages from the mean and deviation of all.
      Metrics: `growth/groups`, those that were dead after G answers, and `growth/alive`, those of them that came alive.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        if args.num_generations_max is None:
            return
        option = f"num_generations_max={args.num_generations_max}"
        self._collect_for(option)
        if not self._samples_shared:
            raise ValueError(
                f"{option} draws on prompts that shared sampling keeps, and here it is off (the log says why, or "
                f"use_vllm). Use num_generations_max=None."
            )
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % args.num_generations:
            raise ValueError(
                f"{option} needs whole groups in each process, got {rows} rows a rollout (per_device_train_batch_size="
                f"{args.per_device_train_batch_size} x steps_per_generation={args.steps_per_generation}) and "
                f"num_generations={args.num_generations}. Choose them so that the rows are a multiple of it."
            )

    def _draw(self, inputs: list[dict[str, Any]]) -> Rollout:
        if self.args.num_generations_max is None:
            return super()._draw(inputs)
        with self._sampler.keep_prompt_caches():
            return self._grow(inputs, super()._draw(inputs), self.args.num_generations_max)

    def _grow(self, inputs: list[dict[str, Any]], rollout: Rollout, most: int) -> Rollout:
        """Draw more answers to dead groups, up to `most` each.

        Legend: P groups of all processes, M = `most`, F reward functions.
        """
        G, rank = self.num_generations, self.accelerator.process_index
        groups = len(inputs) // G  # of each process
        first = rank * groups
        answers = [rollout.answers[i * G : (i + 1) * G] for i in range(groups)]
        rewards_PMF = _with_room(rollout.rewards_BF.unflatten(0, (-1, G)), most)
        drawn, grown = G, set[int]()
        while drawn < most:
            dead = (~mixed_groups(self._total(rewards_PMF))).nonzero().flatten().tolist()
            dead_of = [[i for i in dead if i // groups == r] for r in range(self.accelerator.num_processes)]
            # Every process draws for as many groups; what is drawn for the first one, to fill up, is not used.
            places = max(map(len, dead_of))
            if places == 0:
                break
            extra = min(G, most - drawn)
            mine = dead_of[rank] + [first] * (places - len(dead_of[rank]))
            more, more_BF = self._answer([inputs[(i - first) * G] for i in mine for _ in range(extra)])
            for group, start in _starts(dead_of, places, extra):
                rewards_PMF[group, drawn : drawn + extra] = more_BF[start : start + extra]
                if group // groups == rank:
                    here = start - rank * len(more)
                    answers[group - first] += more[here : here + extra]
            grown |= set(dead)
            drawn += extra
        rollout.all_rewards_PM = self._total(rewards_PMF)
        alive = grown & set(mixed_groups(rollout.all_rewards_PM).nonzero().flatten().tolist())
        self._metrics["train"]["growth/groups"].append(float(len(grown)))
        self._metrics["train"]["growth/alive"].append(float(len(alive)))
        for group in alive:
            chosen = max_variance_subset(rollout.all_rewards_PM[group], G)
            kept = [answers[group - first][i] for i in chosen] if group // groups == rank else []
            rollout.put(group, kept, rewards_PMF[group, chosen], rollout.all_rewards_PM[group])
        return rollout


def _with_room(rewards_PGF: Tensor, most: int) -> Tensor:
    """With places for answers that are not drawn yet, NaN."""
    P, G, F = rewards_PGF.shape
    return torch.cat([rewards_PGF, rewards_PGF.new_full((P, most - G, F), torch.nan)], dim=1)


def _starts(dead_of: list[list[int]], places: int, extra: int) -> Iterator[tuple[int, int]]:
    """Of each dead group, its index and its first row among those that all processes drew."""
    for process, dead in enumerate(dead_of):
        for place, group in enumerate(dead):
            yield group, (process * places + place) * extra
