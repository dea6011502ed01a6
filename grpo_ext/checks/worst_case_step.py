"""One step of the largest shape before the first one: what would run out of memory at step 300 does so now.

The longest prompt and `max_completion_length` new tokens in every row: a rollout with its reference pass, then the loss
and gradients of a full micro-batch beside the states of the optimizer. Rewards are not called. Nothing of it stays: no
gradient, no metric, no random number.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_ext.machine import peak_memory_mb
from grpo_ext.model.adapters import trainable_parameters

STATES_OF_ADAM = 2  # tensors that the optimizer keeps for each trainable parameter
# What a rollout and a loss change in place.
CHANGED = "state generation_config _metrics _logs _pending_extra_logs _pending_metrics _sampler _phases _entropy_seen"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the step took: seconds, the most memory in MB; and the first prompt with an answer, special tokens shown."""

    seconds: float
    peak_mb: float
    prompt: str
    answer: str


def why_not_rehearsed(trainer: GRPOTrainer) -> str | None:
    """What makes a rehearsal impossible, or would show it to a program of the user's; None where nothing does."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    reasons = {
        "rollout_func draws the answers": trainer.rollout_func is not None,
        "tools and environments would be called": bool(trainer.tools) or trainer.environment_factories is not None,
        "prompts hold images": trainer._is_vlm,
        "parameters are not in one piece before the run": is_sharded,
        "answers are drawn by vLLM, which reserves its memory itself": trainer.use_vllm,
        "the data has no length": not hasattr(trainer.train_dataset, "__len__"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def rehearse(trainer: GRPOTrainer, longest: dict[str, Any], first: list[int]) -> Rehearsal:
    """Run one step of the largest shape, and draw one answer to show.

    Args:
        longest: the row of the data with the longest prompt.
        first: token ids of the prompt that is answered.

    Raises:
        RuntimeError: it does not fit into memory; the message says what makes it smaller.
    """
    args = trainer.args
    rows = args.generation_batch_size // args.world_size
    try:
        with _leaving_nothing(trainer):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            _update(trainer, _rollout(trainer, [longest] * rows))
            seconds, peak = time.monotonic() - started, peak_memory_mb(trainer.accelerator.device)
            (answer,), _ = trainer._generate_single_turn([first], None, {}, trainer.num_generations)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(
            f"One step of the largest shape does not fit into memory: {rows} rows in the sampler and "
            f"{args.per_device_train_batch_size} in the update, with the longest prompt and "
            f"max_completion_length={args.max_completion_length}. Lower chunk_tokens (now {args.chunk_tokens}), "
            f"max_completion_length, max_prompt_tokens (now {args.max_prompt_tokens}), or per_device_train_batch_size "
            f"with more gradient_accumulation_steps. `grpo-ext plan` says what fits."
        ) from error
    decode = trainer._tokenizer.decode
    return Rehearsal(seconds=seconds, peak_mb=peak, prompt=decode(first), answer=decode(answer))


def _rollout(trainer: GRPOTrainer, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """TRL's own, with answers of full length. In evaluation mode, where mechanisms that draw again keep out of it."""
    trainer.model.eval()
    trainer.num_generations_eval = trainer.num_generations
    trainer.generation_config.min_new_tokens = trainer.max_completion_length

    def alternating(*_: Any) -> Tensor:
        rows = len(inputs) * trainer.accelerator.num_processes
        rewards_BF = torch.zeros(rows, len(trainer.reward_funcs), device=trainer.accelerator.device)
        rewards_BF[::2] = 1.0
        trainer._rewards_per_func_BF = rewards_BF
        return rewards_BF

    trainer._calculate_rewards = alternating
    try:
        return trainer._generate_and_score_completions([dict(row) for row in inputs])
    finally:
        trainer.generation_config.min_new_tokens = None


def _update(trainer: GRPOTrainer, rollout: dict[str, Tensor]) -> None:
    """Loss and gradients of a micro-batch."""
    args = trainer.args
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    parameters = trainable_parameters(trainer.model).values()
    optimizer_states = [torch.zeros_like(p) for p in parameters for _ in range(STATES_OF_ADAM)]
    rows = args.per_device_train_batch_size
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(
            trainer.model, {name: value[:rows] if value.ndim else value for name, value in rollout.items()}
        )
    loss.backward()
    del optimizer_states


@contextmanager
def _leaving_nothing(trainer: GRPOTrainer) -> Iterator[None]:
    """Put back whatever the rehearsal changes: attributes, gradients, torch's random state. No tracker hears of it: the
    run that they would add it to has not begun."""
    attributes = dict(vars(trainer))
    trackers, trainer.args.report_to = trainer.args.report_to, []
    device = trainer.accelerator.device
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    was_training = trainer.model.training
    for name in CHANGED.split():
        setattr(trainer, name, copy.deepcopy(attributes[name]))
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        trainer.args.report_to = trackers
        trainer.model.train(was_training)
        trainer.model.zero_grad(set_to_none=True)
        vars(trainer).clear()
        vars(trainer).update(attributes)
