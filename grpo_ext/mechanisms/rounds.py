"""TRL's trainer with rollouts that are drawn in rounds: dead groups are counted, and may be drawn anew."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from grpo_ext.algorithm.advantages import alive_groups, combine_rewards, kinds_of_groups
from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.shared_sampling import SharedSamplingTrainer


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A row of a rollout: what was asked, what came out of `_generate`, and what reward functions logged beside."""

    example: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logps: list[float] | None
    is_cut: bool | None
    extra: dict[str, Any]


class RoundsTrainer(SharedSamplingTrainer):
    """TRL's `GRPOTrainer` with these differences:

    - Shares of the groups that were drawn, in the metrics: `frac_groups/mixed`, `frac_groups/all_right`,
      `frac_groups/all_wrong`, and `frac_dead_groups`.
    - `dead_groups="resample"`: the places of dead groups go to groups on other prompts, drawn at random from the data
      set, in at most `max_resample_rounds` rounds; what is dead then stays. TRL then works on the full rollout as if it
      had been drawn at once. Metric: `resampled_groups`, places that went to another prompt.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._collected: list[_Answer] | None = None  # this process's rows of a rollout that is complete
        self._rewards_per_func_BF: Tensor | None = None  # of all processes' rows of the rollout
        self._rollout_of_step = (-1, 0)  # the optimizer step and how many rollouts it has had
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        if args.dead_groups != "resample":
            return
        reasons = {
            "tools": bool(self.tools),
            "environment_factory": self.environment_factories is not None,
            "rollout_func": self.rollout_func is not None,
            "images": self._is_vlm,
            "a streamed data set (IterableDataset)": isinstance(self.train_dataset, IterableDataset),
        }
        for name, is_there in reasons.items():
            if is_there:
                raise ValueError(f"dead_groups='resample' does not work with {name}. Use dead_groups='keep' or 'skip'.")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self.args.dead_groups == "resample":
            inputs = self._collect(inputs)
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            was_collected, self._collected = self._collected is not None, None
        if not was_collected:
            assert self._rewards_per_func_BF is not None
            self._count_groups(mode, self._rewards_per_func_BF)
        return output

    def _collect(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw rounds until no group is dead or none is left; the examples of the rows that it ends with."""
        G, world, rank = self.num_generations, self.accelerator.num_processes, self.accelerator.process_index
        draw = self._random_prompts()
        answers, rewards_BF = self._draw(inputs)
        everything_BF, places = [rewards_BF.clone()], 0
        for _ in range(self.args.max_resample_rounds):
            dead = (~alive_groups(self._total(rewards_BF), G)).nonzero().flatten().tolist()
            if not dead:
                break
            # As many rows in each process, which may take some groups more than there are places.
            groups = len(dead)
            while groups * G % world:
                groups += 1
            indices = range(len(self.train_dataset))
            fresh_indices = draw.sample(indices, groups) if groups <= len(indices) else draw.choices(indices, k=groups)
            examples = [self.train_dataset[i] for i in fresh_indices]
            rows = [dict(example) for example in examples for _ in range(G)]
            share = len(rows) // world
            fresh, fresh_BF = self._draw(rows[rank * share : (rank + 1) * share])
            fresh = gather_object(fresh)
            everything_BF.append(fresh_BF)
            alive = alive_groups(self._total(fresh_BF), G).nonzero().flatten().tolist()
            first = rank * len(answers)
            for place, group in zip(dead, alive, strict=False):
                rewards_BF[place * G : (place + 1) * G] = fresh_BF[group * G : (group + 1) * G]
                for i in range(G):
                    row = place * G + i - first
                    if 0 <= row < len(answers):
                        answers[row] = fresh[group * G + i]
                places += 1
        self._metrics["train"]["resampled_groups"].append(float(places))
        self._count_groups("train", torch.cat(everything_BF))
        self._rewards_per_func_BF = rewards_BF
        self._collected = answers
        return [answer.example for answer in answers]

    def _random_prompts(self) -> random.Random:
        """The same on every process, and in a run that is resumed."""
        step, rollouts = self._rollout_of_step
        rollouts = rollouts + 1 if step == self.state.global_step else 0
        self._rollout_of_step = self.state.global_step, rollouts
        return random.Random(f"{self.args.seed} {self.state.global_step} {rollouts}")

    def _draw(self, inputs: list[dict[str, Any]]) -> tuple[list[_Answer], Tensor]:
        """Answers to these rows of this process, and the rewards of all processes."""
        prompts = [example["prompt"] for example in inputs]
        prompt_ids, completion_ids, _, completions, logps, *_ = self._generate(prompts)
        rewards_BF = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        answers = [
            _Answer(
                example=example,
                prompt_ids=prompt_ids[i],
                completion_ids=completion_ids[i],
                completion=completions[i],
                logps=None if logps is None else logps[i],
                is_cut=self._is_cut[i] if self._is_cut else None,
                extra={column: values[i] for column, values in extra.items()},
            )
            for i, example in enumerate(inputs)
        ]
        return answers, rewards_BF

    def _generate(self, prompts: list[Any]) -> Any:
        answers = self._collected
        if answers is None:
            return super()._generate(prompts)
        known = [answer.logps for answer in answers if answer.logps is not None]
        logps = known if len(known) == len(answers) else None
        self._keep_drawn(logps, [bool(answer.is_cut) for answer in answers])
        ids = [answer.prompt_ids for answer in answers], [answer.completion_ids for answer in answers]
        return *ids, None, [answer.completion for answer in answers], logps, {}, None, []

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._collected is None:
            self._rewards_per_func_BF = super()._calculate_rewards(*args, **kwargs)
        else:
            for answer in self._collected:
                for column, value in answer.extra.items():
                    self._pending_extra_logs[column].append(value)
        assert self._rewards_per_func_BF is not None
        return self._rewards_per_func_BF

    def _total(self, rewards_per_func_BF: Tensor) -> Tensor:
        """The reward of each row, shape (B,)."""
        return combine_rewards(rewards_per_func_BF, self.reward_weights.to(rewards_per_func_BF.device))

    def _count_groups(self, mode: str, rewards_per_func_BF: Tensor) -> None:
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        attainable = self.reward_weights.clamp(min=0).sum().item()
        kinds = kinds_of_groups(self._total(rewards_per_func_BF), num_generations, attainable)
        for kind, share in kinds.items():
            self._metrics[mode][f"frac_groups/{kind}"].append(share)
        self._metrics[mode]["frac_dead_groups"].append(1.0 - kinds["mixed"])
