"""`GRPOExtTrainer`: a thin adapter between TRL's `GRPOTrainer` and the rooms below."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from grpo_ext.config import GRPOExtConfig
from grpo_ext.console.phase_timer import PhaseTimer
from grpo_ext.console.progress import RewardProgress
from grpo_ext.losses.advantages import population_advantages
from grpo_ext.losses.sequence_grpo import SequenceGRPO
from grpo_ext.machine import peak_memory_mb
from grpo_ext.mechanisms.guards import GuardedTrainer
from grpo_ext.mechanisms.reference_kl import completion_loss_mask
from grpo_ext.model.adapters import copy_adapter_values, restore_adapter_in_float32
from grpo_ext.model.load import frozen_dtype
from grpo_ext.report.metrics_file import MetricsFile
from grpo_ext.rollout.reward_workers import WorkersEnd, in_workers

# Inputs of a multimodal model that TRL carries from the rollout to the scoring pass, under its own names.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class GRPOExtTrainer(GuardedTrainer):
    """TRL's `GRPOTrainer`, same constructor, with these differences and no others:

    - `loss_type="grpo_sequence"`: the document's objective, computed by `losses/sequence_grpo.py`.
    - `scale_rewards="population"`: the document's group normalisation, computed by `losses/advantages.py`.
    - `share_prompt=True`: completions are drawn, and log-probs of every loss computed, with each prompt read once for
      all of its completions, see `mechanisms/shared_sampling.py` and `mechanisms/shared_prompt.py`.
    - LoRA on the LM head is trained, tied embeddings included: `mechanisms/adapted_head.py`.
    - `kl_estimator`, `log_kl` and `sync_ref_model` with adapters: `mechanisms/reference_kl.py`.
    - `num_generations_max`: `mechanisms/growth.py`.
    - `dead_groups`: `mechanisms/resampling.py` and `mechanisms/dead_groups.py`.
    - `temperature_schedule`: `mechanisms/temperature.py`.
    - `replay_fraction`: `mechanisms/replay.py`.
    - Its own card, and what is pushed to the Hub is chosen and cannot end a run: `mechanisms/publishing.py`.
    - Checkpoints that are whole, and exact resume: `mechanisms/resume.py`.
    - Rewards run in worker processes: `rollout/reward_workers.py`; not beside an `environment_factory`, whose
      environments live in the process of the training.
    - `guards`, `dry_run`, `kl_stop`: checks before the first step, and a watch on the run: `mechanisms/guards.py`.
    - The frozen base of an adapter is loaded in bfloat16 where the device has it, and adapters are kept in float32.
    - `metrics.jsonl`, and what else a report needs, in the output folder: `mechanisms/recording.py`. Seconds per phase
      and memory are in the metrics, reward and accuracy on the progress bar.

    Every other loss, option and code path is TRL's own. Metrics that this trainer adds to TRL's: `kl_sequence` (nats
    per answer), `ratio`, `policy_loss`, `advantages/mean`, `advantages/mean_abs`,
    `frac_dead_groups`, `frac_groups/mixed|all_right|all_wrong`, `reward_drawn`, `growth/groups|alive`,
    `resampled_groups`, `replay/hit_rate|age|dropped_old|dropped_far`, `temperature`,
    `time/generate|reward|reference|update` (seconds per optimizer step), `peak_memory_mb` (the largest so far).

    Raises:
        TypeError: `args` is not a `GRPOExtConfig`.
    """

    args: GRPOExtConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOExtConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOExtConfig(f"{name.split('/')[-1]}-GRPO")
        elif not isinstance(args, GRPOExtConfig):
            raise TypeError(
                f"GRPOExtTrainer needs args of type GRPOExtConfig, got {type(args).__name__}. "
                f"GRPOExtConfig takes the same fields: replace the class name."
            )
        if isinstance(model, str) and keywords.get("peft_config") is not None:
            args.model_init_kwargs = {"dtype": frozen_dtype(args), **(args.model_init_kwargs or {})}

        if keywords.get("environment_factory") is None:
            reward_funcs = in_workers(reward_funcs, args.reward_workers, args.reward_timeout)
        self._phases = PhaseTimer()
        self._timed_from_step: int | None = None
        adapter_values = copy_adapter_values(model)
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        if not (args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3):  # it cannot mix dtypes (TRL #6089)
            restore_adapter_in_float32(self.model, adapter_values)
        if args.scale_rewards == "population":
            self.scale_rewards = "none"  # TRL's own value, so that its rollout runs; ours replaces the result
        self._sequence_objective = SequenceGRPO(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            beta=self.beta,
            entropy_coef=self.entropy_coef,
        )
        self.add_callback(MetricsFile())
        self.add_callback(WorkersEnd(self.reward_funcs))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RewardProgress())

    # Rollout

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._phases("generate"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._phases("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Beside sampling and rewards, what takes time in a rollout are the old and reference passes.
        with self._phases("reference"):
            output = super()._generate_and_score_completions(inputs)
        if self.args.scale_rewards == "population":
            output["advantages"] = self._population_advantages(len(inputs))
        return output

    def _population_advantages(self, local_rows: int) -> Tensor:
        """The advantages of this process's rows; those of all processes go to the logs in place of TRL's."""
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        assert self._rewards_per_func_BF is not None
        advantages_B = population_advantages(
            self._total(self._rewards_per_func_BF), num_generations, all_rewards_PM=self._all_rewards_PM
        )
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages_B))):
            logged.pop()
        logged.extend(advantages_B.tolist())
        self._metrics[mode]["advantages/mean"].append(advantages_B.mean().item())
        self._metrics[mode]["advantages/mean_abs"].append(advantages_B.abs().mean().item())
        start = self.accelerator.process_index * local_rows
        return advantages_B[start : start + local_rows]

    # Update

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._timed_from_step is None:
            self._timed_from_step = self.state.global_step
        with self._phases("update"):
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.loss_type != "grpo_sequence":
            return super()._compute_loss(model, inputs)
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        mask = completion_loss_mask(inputs)
        with self._exact_kl_of(inputs):
            logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
                torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
                completion_ids.size(1),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in MULTIMODAL_INPUTS},
            )
        assert entropies is not None
        loss, metrics = self._sequence_objective(
            logps,
            old_logps_BC=inputs.get("old_per_token_logps"),
            kl_BC=self._token_kl(inputs, logps) if self._has_reference else None,
            entropies_BC=entropies,
            mask_BC=mask,
            advantages_B=inputs["advantages"],
            policy_weights_B=self._policy_weights(inputs, logps, mask),
        )
        mode = "train" if self.model.training else "eval"
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        totals = self.accelerator.reduce(torch.stack([torch.stack(pair) for pair in metrics.values()]))
        for name, (total, count) in zip(metrics, totals.tolist(), strict=True):
            self._metrics[mode][name].append(total / max(count, 1.0))
        # The trainer does not divide by the accumulation steps itself (`loss_is_scaled_for_ga`).
        return loss / self.current_gradient_accumulation_steps if mode == "train" else loss

    def _policy_weights(self, inputs: dict[str, Any], logps: Tensor, mask: Tensor) -> Tensor | None:
        """Factors that TRL's options put on the policy term of each row, shape (B,); None where there are none."""
        weights = None
        if self.off_policy_mask_threshold is not None:
            old_logps = inputs.get("old_per_token_logps", logps.detach())
            weights = self.get_off_policy_mask(
                advantages=inputs["advantages"].unsqueeze(1),
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logps),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            ).squeeze(1)
        if "importance_sampling_ratio" in inputs:
            correction = inputs["importance_sampling_ratio"].squeeze(1)
            weights = correction if weights is None else weights * correction
        return weights

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._timed_from_step is not None and "loss" in logs:
            steps = max(1, self.state.global_step - self._timed_from_step)
            self._timed_from_step = None
            logs |= {f"time/{phase}": seconds / steps for phase, seconds in self._phases.pop().items()}
            logs["peak_memory_mb"] = round(peak_memory_mb(self.accelerator.device))
        super().log(logs, start_time)

    def log_alone(self, metrics: dict[str, float]) -> None:
        """Log these values now, without closing the running means that TRL's `log` would flush with them, and without
        taking the place of the step's own log."""
        due = self.control.should_log
        super(GRPOTrainer, self).log(metrics)
        self.control.should_log = due
