"""Watches a run during training. Each message gives the event, its likely cause, and what to do.

- The KL at the first step is not 0, so the reference is not the starting policy: the run stops.
- No trainable parameter moved in an update that had a gradient: the run stops.
- A loss or gradient is not finite: the update is skipped and its batch saved. The third one in a row stops the run.
- The KL is above `kl_stop`: the run saves and ends.
- Nearly every completion was cut off in five rollouts in a row, or every group was dead in twenty: one warning.

Failing rewards are watched where they run, in `rewards/workers/pool.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from grpo_ext.model.adapters import local_shard, trainable_parameters

logger = get_logger(__name__)

MAX_SKIPPED_IN_A_ROW = 3
CUT_SHARE, CUT_ROLLOUTS = 0.9, 5
DEAD_ROLLOUTS = 20
# Nats per token: the largest value that rounding may give to a KL of 0, in float32 and with autocast.
ZERO_KL, ZERO_KL_AUTOCAST = 1e-3, 1e-2
PART = 2**20  # values of a parameter that are summed at a time
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value


class Watch(TrainerCallback):
    """Watches one trainer, which calls `after_rollout` and `after_loss`; transformers calls the rest as callbacks.

    Its counts are in checkpoints, so a resumed run stops and warns exactly when an uninterrupted one would.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        train_metrics: Callable[[], dict[str, list[float]]],
        micro_batches: Callable[[], list[dict[str, Any]]],
    ):
        self._trainer, self._train_metrics, self._micro_batches = trainer, train_metrics, micro_batches
        self._marks: Tensor | None = None  # sums of the trainable parameters before the first update
        self._had_gradient = False
        self._rate = 0.0  # learning rate of the coming update
        self._is_bad = torch.zeros((), device=trainer.accelerator.device)  # whether a loss of this step was not finite
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._skipped = self._skipped_in_a_row = self._cut_in_a_row = self._dead_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "cut_in_a_row": self._cut_in_a_row,
            "dead_in_a_row": self._dead_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._cut_in_a_row, self._dead_in_a_row = state["cut_in_a_row"], state["dead_in_a_row"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the initial values of the parameters."""
        if state.global_step == 0:
            self._reset_counts()
        self._marks = _marks(self._trainer)

    def after_loss(self, loss: Tensor) -> None:
        """Record whether the loss of a micro-batch is finite."""
        self._is_bad = torch.maximum(self._is_bad, (~loss.detach().isfinite()).float())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip an update that is not finite, on all processes together.

        Raises:
            RuntimeError: it is the third one in a row, or DeepSpeed has already applied it.
        """
        trainer, step = self._trainer, state.global_step + 1
        self._rate = max(group["lr"] for group in trainer.optimizer.param_groups)
        parameters = trainable_parameters(trainer.model).values()
        norms = self._norms([local_shard(p.grad) for p in parameters if p.grad is not None])
        self._had_gradient = bool(norms.any())
        is_bad = self._is_bad
        if not args.fp16:  # in fp16, the gradient scaler checks for overflows itself, and expects some
            is_bad = torch.maximum(is_bad, (~norms.isfinite().all()).float())
        self._is_bad = torch.zeros_like(self._is_bad)
        if not trainer.accelerator.reduce(is_bad).item():
            self._skipped_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self._had_gradient = False
        self._skipped += 1
        self._skipped_in_a_row += 1
        folder = self._save_batch(step)
        what = f"Step {step}: the loss or its gradient is not finite"
        if trainer.is_deepspeed_enabled:
            raise RuntimeError(
                f"{what}, and DeepSpeed has already applied the update. Its batch is in {folder}. Lower learning_rate "
                f"(now {args.learning_rate:g}), and resume from the last checkpoint."
            )
        what = f"{what}. The update is skipped, and its batch is in {folder}"
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"{what}; it is the third one in a row. Lower learning_rate (now {args.learning_rate:g}), use bf16 "
                f"instead of fp16, or look for weights or rewards that are not finite in that batch."
            )
        logger.warning(f"{what}; the run stops at the third one in a row.")

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each gradient on this process; with DeepSpeed, which hides them, only their total norm."""
        if self._trainer.is_deepspeed_enabled:
            return self._is_bad.new_tensor([float(self._trainer.model_wrapped.get_global_grad_norm() or 0.0)])
        return torch.stack(torch._foreach_norm(gradients)) if gradients else self._is_bad.new_zeros(1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the KL, and whether the first update moved a parameter.

        Raises:
            RuntimeError: the reference is not the starting policy, or no parameter moved.
        """
        metrics = self._train_metrics()
        if self._skipped:
            metrics["nonfinite/skipped"].append(float(self._skipped))
        kls = metrics.get("kl", [])[-args.gradient_accumulation_steps :]
        kl = sum(kls) / len(kls) if kls else 0.0
        if state.global_step == 1 and self._starts_at_reference(args):
            self._check_first_kl(kl, args)
        self._check_moved(state.global_step)
        limit = self._trainer.args.kl_stop
        if limit is not None and kl > limit:
            logger.warning(
                f"Step {state.global_step}: the KL to the reference is {kl:.3g} nats per token, above kl_stop="
                f"{limit:g}. The run saves and ends. Raise beta (now {args.beta:g}) or lower learning_rate to stay "
                f"closer."
            )
            control.should_save = control.should_training_stop = True

    def _starts_at_reference(self, args: TrainingArguments) -> bool:
        """Whether the policy equals the reference before the first update: it has no noise and no virtual prompt."""
        adapters = getattr(self._trainer.model, "peft_config", {}).values()
        return not args.neftune_noise_alpha and not any(adapter.is_prompt_learning for adapter in adapters)

    def _check_first_kl(self, kl: float, args: TrainingArguments) -> None:
        if abs(kl) > (ZERO_KL_AUTOCAST if args.bf16 or args.fp16 else ZERO_KL):
            raise RuntimeError(
                f"KL at step 0 is {kl:.3g} nats per token, should be 0: the reference is not the starting policy. "
                f"Likely causes: an adapter that changes the model before its first update, such as "
                f"init_lora_weights=False; dropout; merged weights. Start from an adapter that does not change the "
                f"model, or use beta=0. guards=False trains anyway."
            )

    def _check_moved(self, step: int) -> None:
        trainer = self._trainer
        if self._marks is None or not self._had_gradient or trainer.accelerator.optimizer_step_was_skipped:
            return
        if not self._rate:  # the first step of a warm-up
            return
        if torch.equal(self._marks, _marks(trainer)):
            raise RuntimeError(
                f"Step {step}: no trainable parameter moved in an update that had a gradient. Check whether "
                f"learning_rate (now {trainer.args.learning_rate:g}) is too small for the precision of the weights, "
                f"and whether the optimizer has the parameters of this model."
            )
        self._marks = None

    def after_rollout(self, metrics: dict[str, list[float]], cut: float) -> None:
        """Check a rollout.

        Args:
            metrics: training metrics; the last value of each list belongs to this rollout.
            cut: share of its completions that were cut off. The metric of that name describes the last sampling, which
                may be a few rows that a stage added.
        """
        step, args = self._trainer.state.global_step + 1, self._trainer.args
        latest = {name: values[-1] for name, values in metrics.items() if values}
        self._cut_in_a_row = self._cut_in_a_row + 1 if cut > CUT_SHARE else 0
        if self._cut_in_a_row == CUT_ROLLOUTS:
            logger.warning(
                f"Step {step}: {cut:.0%} of completions were cut off at {args.max_completion_length} tokens, with more "
                f"than {CUT_SHARE:.0%} in {CUT_ROLLOUTS} rollouts in a row; the mean reward is {latest['reward']:.3g}. "
                f"Raise max_completion_length (finished completions had up to "
                f"{latest['completions/max_terminated_length']:.0f} tokens), or ask for shorter ones in the prompt."
            )
        is_dead = latest.get("frac_dead_groups", 0.0) == 1.0
        self._dead_in_a_row = self._dead_in_a_row + 1 if is_dead else 0
        if self._dead_in_a_row == DEAD_ROLLOUTS:
            right = latest["frac_groups/all_right"]
            advice = (
                "The model already solves these problems: use harder ones."
                if right > 0.5
                else "There is no right completion to learn from: use easier problems, a better model, a larger "
                "num_generations, or num_generations_max, and check the reward with `grpo-ext audit`."
            )
            logger.warning(
                f"Step {step}: in {DEAD_ROLLOUTS} rollouts in a row every group had equal rewards ({right:.0%} of the "
                f"last groups were all right), so the rewards taught nothing. {advice}"
            )

    def _save_batch(self, step: int) -> Path:
        """Save the rollout that this step's update used: `rollout-PROCESS.safetensors`, `settings.json`."""
        trainer = self._trainer
        folder = Path(trainer.args.output_dir, "nonfinite", f"step-{step}")
        folder.mkdir(parents=True, exist_ok=True)
        parts = self._micro_batches()
        tensors = {
            f"{i}.{name}": value.detach().to("cpu", copy=True).contiguous()  # micro-batches may share a value
            for i, part in enumerate(parts)
            for name, value in part.items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, folder / f"rollout-{trainer.accelerator.process_index}.safetensors")
        if trainer.accelerator.is_main_process:
            (folder / "settings.json").write_text(
                json.dumps({"step": step, "micro_batches": len(parts)}) + "\n", encoding="utf-8"
            )
        return folder


def _marks(trainer: GRPOTrainer) -> Tensor:
    """Two sums over this process's shard of each trainable parameter. They are equal as long as nothing moves, and
    hardly ever otherwise. No parameter is copied as a whole."""
    return torch.stack([_sums(local_shard(p).detach()) for p in trainable_parameters(trainer.model).values()])


def _sums(values: Tensor) -> Tensor:
    """The sum of the bits of all values, read as integers, and the sum of their squares, modulo 2^64. Integers, because
    a float32 sum would round small moves away, and Apple's GPUs have no float64."""
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for part in values.flatten().split(PART):
        bits = part.view(INTEGERS[part.element_size()]).long()
        sums += torch.stack([bits.sum(), bits.square().sum()])
    return sums
