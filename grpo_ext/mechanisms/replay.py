"""TRL's trainer with a memory: groups of recent steps take the places of dead ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import pad

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.mechanisms.temperature import TemperatureTrainer
from grpo_ext.rollout.replay_buffer import GroupReplayBuffer, KeptGroup
from grpo_ext.rollout.types import Answer, Rollout

STATE_FILE = "replay.json"
# Nats: an answer whose probability has changed by more than e since it was drawn is too far from the policy to learn
# from, and its group with it.
FURTHEST = 1.0


class ReplayTrainer(TemperatureTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `replay_fraction`: places of dead groups, up to this share of a rollout's groups, go to mixed groups of the last
      `replay_max_age` steps. The log-probs that a replayed answer was drawn with are its old policy in the ratio, at
      the temperature that it was drawn at; its advantage is that of its group then; its reference log-probs are
      computed anew. Metrics: `replay/hit_rate`, of the places that were wanted, the share that was filled;
      `replay/age`, steps; `replay/dropped_old` and `replay/dropped_far`, groups older than `replay_max_age`, or with an
      answer whose summed log-ratio is beyond 1.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        self._loss_inputs: dict[str, Any] | None = None  # the micro-batch in the update
        self._replays = args.replay_fraction > 0
        if not self._replays:
            return
        self._collect_for(f"replay_fraction={args.replay_fraction}")
        if not self._samples_shared:
            raise ValueError(
                f"replay_fraction={args.replay_fraction} needs the log-probs of shared sampling, and here it is off "
                f"(the log says why, or use_vllm). Use replay_fraction=0."
            )
        groups = args.generation_batch_size // args.num_generations
        self._most_replayed = int(args.replay_fraction * groups + 1e-9)  # 0.29 * 100 is less than 29
        if self._most_replayed == 0:
            raise ValueError(
                f"replay_fraction={args.replay_fraction} of {groups} groups a rollout is none. Use at least "
                f"{1 / groups:.2g}, or larger rollouts."
            )
        self._replay = GroupReplayBuffer(capacity=groups * args.replay_max_age, max_age=args.replay_max_age)

    # Rollout

    def _collect(self, inputs: list[dict[str, Any]]) -> Rollout:
        rollout = super()._collect(inputs)
        if self._replays:
            alive_P = mixed_groups(rollout.all_rewards_PM)
            mixed = self._groups_of(rollout, alive_P.nonzero().flatten().tolist())
            self._fill(rollout, (~alive_P).nonzero().flatten().tolist())
            self._replay.add(mixed)
            self._temperatures = [answer.temperature for answer in rollout.answers]
        return rollout

    def _groups_of(self, rollout: Rollout, groups: list[int]) -> list[KeptGroup]:
        """Groups of the rollout, the same on every process."""
        answers = [replace(answer, example={"prompt": answer.example["prompt"]}) for answer in rollout.answers]
        answers = gather_object(answers)
        G, rewards_BF, all_rewards_PM = (
            self.num_generations,
            rollout.rewards_BF.tolist(),
            rollout.all_rewards_PM.tolist(),
        )
        return [
            KeptGroup(
                answers=answers[group * G : (group + 1) * G],
                rewards_GF=rewards_BF[group * G : (group + 1) * G],
                drawn_M=all_rewards_PM[group],
                step=self.state.global_step,
            )
            for group in groups
        ]

    def _fill(self, rollout: Rollout, dead: list[int]) -> None:
        """Give places of dead groups to kept ones."""
        metrics, step = self._metrics["train"], self.state.global_step
        metrics["replay/dropped_old"].append(float(self._replay.drop_old(step)))
        wanted = dead[: self._most_replayed]
        found: list[KeptGroup] = []
        far = 0
        while len(found) < len(wanted) and len(self._replay):
            candidates = self._replay.take(len(wanted) - len(found))
            is_close = [distance <= FURTHEST for distance in self._distances(candidates)]
            far += is_close.count(False)
            found += [group for group, close in zip(candidates, is_close, strict=True) if close]
        metrics["replay/dropped_far"].append(float(far))
        for place, group in zip(wanted, found, strict=False):
            rewards_GF = rollout.rewards_BF.new_tensor(group.rewards_GF)
            rollout.put(place, group.answers, rewards_GF, rollout.all_rewards_PM.new_tensor(group.drawn_M))
            rollout.replayed.add(place)
            metrics["replay/age"].append(float(step - group.step))
        if wanted:
            metrics["replay/hit_rate"].append(len(found) / len(wanted))

    @torch.no_grad()
    def _distances(self, groups: list[KeptGroup]) -> list[float]:
        """Of each group, how far the policy has moved on the answer where it has moved most, in nats; each process
        scores its part of them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(groups) // world)
        distances: list[float] = []
        for group in groups[rank * share : (rank + 1) * share]:
            self._temperatures = [answer.temperature for answer in group.answers]
            logps_GC, mask_GC = self._score_answers(group.answers)
            drawn_GC = _padded([torch.tensor(answer.logps) for answer in group.answers], 0.0, "right")
            gaps_G = ((logps_GC - drawn_GC.to(logps_GC.device)) * mask_GC).sum(dim=1).abs()
            distances.append(gaps_G.max().item())
        return gather_object(distances)

    def _score_answers(self, answers: list[Answer]) -> tuple[Tensor, Tensor]:
        """Log-probs of these answers under the policy as it is now, and their mask, shapes (G, C)."""
        self._sampled_logps = None  # what was drawn last says nothing about these
        device, padding = self.accelerator.device, self._tokenizer.pad_token_id
        prompts = [torch.tensor(answer.prompt_ids, device=device) for answer in answers]
        completions = [torch.tensor(answer.completion_ids, device=device) for answer in answers]
        mask_GC = _padded([torch.ones_like(ids) for ids in completions], 0, "right")
        mask_GS = _padded([torch.ones_like(ids) for ids in prompts], 0, "left")
        ids_GT = torch.cat([_padded(prompts, padding, "left"), _padded(completions, padding, "right")], dim=1)
        mask_GT, C = torch.cat([mask_GS, mask_GC], dim=1), mask_GC.size(1)
        rows = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids_GT, mask_GT, C, batch_size=rows)[0], mask_GC

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._replays and self.model.training:
            output["temperature"] = torch.tensor(self._temperatures, dtype=torch.float64)
            output["is_replayed"] = torch.tensor(self._is_replayed, device=self.accelerator.device)
        self._temperatures = None
        return output

    # Update

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "is_replayed" in inputs:
            inputs = dict(inputs)  # the loss is given old log-probs
            self._loss_inputs, self._temperatures = inputs, inputs["temperature"].tolist()
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._loss_inputs = self._temperatures = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = self._loss_inputs
        # The old policy of rows that this very policy drew is this policy, of the others the one that drew them.
        if inputs is not None and "old_per_token_logps" not in inputs and inputs["is_replayed"].any():
            is_replayed_B1 = inputs["is_replayed"].unsqueeze(1)
            inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"].where(is_replayed_B1, scored[0].detach())
        return scored

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._replays and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self._replay.save(folder / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", STATE_FILE)
        if self._replays and checkpoint is not None and path.exists():  # else the run began without a memory
            self._replay.load(path)


def _padded(rows: list[Tensor], value: float, side: str) -> Tensor:
    return pad(rows, padding_value=value, padding_side=side)
