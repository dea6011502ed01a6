"""TRL's trainer with rollouts that may be put together before TRL works on them, and with a count of dead groups.

TRL generates, runs the old and reference passes, and only then computes rewards. Mechanisms that look at rewards first
draw as often as they need, and then let TRL's own method answer from what they collected.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.advantages import combine_rewards, group_kind_shares
from grpo_ext.mechanisms.dialogues import DialogueTrainer
from grpo_ext.rollout.types import Answer, Rollout


class RoundsTrainer(DialogueTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - Shares of the groups that were drawn, in the metrics: `frac_groups/mixed`, `frac_groups/all_right`,
      `frac_groups/all_wrong`, and `frac_dead_groups`. Where rollouts are collected first, `reward_drawn` is the mean
      reward of every answer that was drawn; TRL's `reward` is that of the answers it was given.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._collects = False  # whether rollouts are put together first
        self._rollout: Rollout | None = None  # complete, for TRL to work on
        self._rewards_per_func_BF: Tensor | None = None  # of all processes' rows of the rollout
        self._all_rewards_PM: Tensor | None = None  # total rewards of all answers drawn to each of its groups
        self._counted: list[Tensor] = []  # those of the groups drawn for it, also of groups that it does not hold
        super().__init__(model, reward_funcs, args, *rest, **keywords)

    def _collect_for(self, option: str) -> None:
        """Collect rollouts in this run; `option` is the setting that asks for it."""
        reasons = {
            "tools": bool(self.tools),
            "environment_factory": self.environment_factories is not None,
            "rollout_func": self.rollout_func is not None,
            "images": self._is_vlm,
        }
        for name, is_there in reasons.items():
            if is_there:
                raise ValueError(f"{option} does not work with {name}. Leave one of them out.")
        self._collects = True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self._all_rewards_PM, self._counted = None, []
        if mode == "train" and self._collects:
            self._rollout = self._collect(inputs)
            self._rewards_per_func_BF, self._all_rewards_PM = self._rollout.rewards_BF, self._rollout.all_rewards_PM
            self._metrics["train"]["reward_drawn"].append(torch.cat(self._counted).nanmean().item())
            inputs = [answer.example for answer in self._rollout.answers]
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rollout = None
        if not self._counted:
            assert self._rewards_per_func_BF is not None
            num_generations = self.num_generations if mode == "train" else self.num_generations_eval
            self._counted.append(self._total(self._rewards_per_func_BF).view(-1, num_generations))
        self._count_groups(mode)
        return output

    def _collect(self, inputs: list[dict[str, Any]]) -> Rollout:
        """A rollout for these rows of the data, put together as the mechanisms want it."""
        rollout = self._draw(inputs)
        self._counted.append(rollout.all_rewards_PM.clone())
        return rollout

    def _draw(self, inputs: list[dict[str, Any]]) -> Rollout:
        """Whole groups of answers to these rows of this process."""
        answers, rewards_BF = self._answer(inputs)
        all_rewards_PM = self._total(rewards_BF).view(-1, self.num_generations)
        first = self.accelerator.process_index * len(answers)
        return Rollout(answers=answers, first=first, rewards_BF=rewards_BF, all_rewards_PM=all_rewards_PM)

    def _answer(self, inputs: list[dict[str, Any]]) -> tuple[list[Answer], Tensor]:
        """An answer to each of these rows of this process, and the rewards of all processes, shape (B, F)."""
        prompts = [example["prompt"] for example in inputs]
        prompt_ids, completion_ids, _, completions, logps, *_ = self._generate(prompts)
        rewards_BF = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        answers = [
            Answer(
                example=example,
                prompt_ids=prompt_ids[i],
                completion_ids=completion_ids[i],
                completion=completions[i],
                logps=None if logps is None else logps[i],
                is_cut=self._is_cut[i] if self._is_cut else None,
                temperature=self.temperature,
                extra={column: values[i] for column, values in extra.items()},
            )
            for i, example in enumerate(inputs)
        ]
        return answers, rewards_BF

    def _generate(self, prompts: list[Any]) -> Any:
        rollout = self._rollout
        if rollout is None:
            return super()._generate(prompts)
        answers = rollout.answers
        known = [answer.logps for answer in answers if answer.logps is not None]
        logps = known if len(known) == len(answers) else None
        is_replayed = rollout.is_replayed(self.num_generations)
        self._keep_drawn(logps, [bool(answer.is_cut) for answer in answers], is_replayed)
        ids = [answer.prompt_ids for answer in answers], [answer.completion_ids for answer in answers]
        return *ids, None, [answer.completion for answer in answers], logps, {}, None, []

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._rollout is None:
            self._rewards_per_func_BF = super()._calculate_rewards(*args, **kwargs)
        else:
            for answer in self._rollout.answers:
                for column, value in answer.extra.items():
                    self._pending_extra_logs[column].append(value)
        assert self._rewards_per_func_BF is not None
        return self._rewards_per_func_BF

    def _total(self, rewards_per_func_BF: Tensor) -> Tensor:
        """The reward of each row, shape (B,)."""
        return combine_rewards(rewards_per_func_BF, self.reward_weights.to(rewards_per_func_BF.device))

    def _count_groups(self, mode: str) -> None:
        attainable = self.reward_weights.clamp(min=0).sum().item()
        kinds = group_kind_shares(torch.cat(self._counted), attainable)
        for kind, share in kinds.items():
            self._metrics[mode][f"frac_groups/{kind}"].append(share)
        self._metrics[mode]["frac_dead_groups"].append(1.0 - kinds["mixed"])
