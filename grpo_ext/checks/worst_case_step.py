"""One step of the largest shape before the first one: what would run out of memory at step 300 does so now.

The longest prompt and `max_completion_length` new tokens in every row: a rollout with its reference pass, then the loss
and gradients of a full micro-batch, next to the states of the optimizer. Rewards are not called. Nothing of it stays:
no gradient, no metric, no random number.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext.machine import peak_memory_mb
from grpo_ext.memory.plan import ADAM_STATES
from grpo_ext.model.adapters import trainable_parameters
from grpo_ext.model.chat import text_tokenizer

if TYPE_CHECKING:
    from grpo_ext.trainer import GRPOExtTrainer


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """What the step took, in seconds and in MB at its peak; the first prompt and a completion, special tokens shown."""

    seconds: float
    peak_mb: float
    prompt: str
    completion: str


def why_not_run(trainer: "GRPOExtTrainer") -> str | None:
    """The reason why the step cannot be run, or would be seen by a program of the user's; None if it can."""
    reasons = {
        "rollout_func draws the answers": trainer.rollout_func is not None,
        "tools and environments would be called": bool(trainer.tools) or trainer.environment_factories is not None,
        "prompts hold images": trainer.is_multimodal,
        "parameters are not in one piece before the run": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "answers are drawn by vLLM, which reserves its memory itself": trainer.use_vllm,
        "the data has no length": not hasattr(trainer.train_dataset, "__len__"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run_worst_case_step(trainer: "GRPOExtTrainer", longest: dict[str, Any], first: list[int]) -> WorstCase:
    """Run one step of the largest shape, and sample one completion to show.

    Args:
        longest: the row of the dataset with the longest prompt.
        first: token ids of the prompt that is completed.

    Raises:
        RuntimeError: the step does not fit into memory; the message says what makes it smaller.
    """
    args = trainer.args
    rows = args.generation_batch_size // args.world_size
    try:
        with _without_a_trace(trainer) as scratch:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            _update(scratch, _rollout(scratch, [longest] * rows))
            seconds, peak = time.monotonic() - started, peak_memory_mb(trainer.accelerator.device)
            completion = scratch.sample_completion(first)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(
            f"One step of the largest shape does not fit into memory: {rows} rows in the sampler and "
            f"{args.per_device_train_batch_size} in the update, with the longest prompt and "
            f"max_completion_length={args.max_completion_length}. Lower chunk_tokens (now {args.chunk_tokens}), "
            f"max_completion_length, max_prompt_tokens (now {args.max_prompt_tokens}), or per_device_train_batch_size "
            f"with more gradient_accumulation_steps. `grpo-ext plan` says what fits."
        ) from error
    decode = text_tokenizer(trainer.processing_class).decode
    return WorstCase(seconds=seconds, peak_mb=peak, prompt=decode(first), completion=decode(completion))


def _rollout(trainer: "GRPOExtTrainer", examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """TRL's own, with completions of full length; in evaluation mode, in which no stage samples again."""
    trainer.model.eval()
    trainer.num_generations_eval = trainer.num_generations
    trainer.generation_config.min_new_tokens = trainer.max_completion_length
    rows = len(examples) * trainer.accelerator.num_processes
    rewards_BF = torch.zeros(rows, len(trainer.reward_funcs), device=trainer.accelerator.device)
    rewards_BF[::2] = 1.0
    try:
        return trainer.roll_out_with([dict(row) for row in examples], rewards_BF)
    finally:
        trainer.generation_config.min_new_tokens = None


def _update(trainer: "GRPOExtTrainer", rollout: dict[str, Tensor]) -> None:
    """Loss and gradients of a micro-batch."""
    args = trainer.args
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    parameters = trainable_parameters(trainer.model).values()
    optimizer_states = [torch.zeros_like(p) for p in parameters for _ in range(ADAM_STATES)]
    rows = args.per_device_train_batch_size
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(
            trainer.model, {name: value[:rows] if value.ndim else value for name, value in rollout.items()}
        )
    loss.backward()
    del optimizer_states


@contextmanager
def _without_a_trace(trainer: "GRPOExtTrainer") -> Iterator["GRPOExtTrainer"]:
    """A scratch copy of the trainer; afterwards the states of its parts, the gradients and torch's random state are as
    they were before."""
    states = {name: copy.deepcopy(part.state_dict()) for name, part in trainer.parts.states.items()}
    device = trainer.accelerator.device
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    was_training = trainer.model.training
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield trainer.scratch_copy()
    finally:
        trainer.model.train(was_training)
        trainer.model.zero_grad(set_to_none=True)
        for name, part in trainer.parts.states.items():
            part.load_state_dict(states[name])
