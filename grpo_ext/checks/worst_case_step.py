"""One step of the largest shape before training: a run that would exceed its memory at step 300 fails immediately.

Every prompt of the rollout is as long as the longest one, and no two of them are equal, because equal prompts are
computed once. Every completion has `max_completion_length` tokens, or one fewer, so that rows leave the batch at
different times:

    a rollout, with its reference pass    rows / G prompts, extended to `num_generations_max` if the run extends groups
    a second one, if the run replays      its first group is dead and is replaced by one of the first rollout
    loss and gradients                    of the micro-batch with the most prompts, in addition to the optimizer states

It leaves out resampling rounds, which sample no more than the rollout itself, and dialogues, whose prompts only their
environment knows. Rewards are not called. Metrics and random state are restored afterwards.
"""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext.checks.chunk_size import choose_on
from grpo_ext.checks.trial import rows_of, update, without_a_trace
from grpo_ext.engine.out_of_memory import is_out_of_memory
from grpo_ext.machine import peak_memory_mb
from grpo_ext.model.chat import text_tokenizer
from grpo_ext.rollout.stages.replay import Replay
from grpo_ext.rollout.stages.resample import Resample

if TYPE_CHECKING:
    from grpo_ext.trainer import GRPOExtTrainer


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """Duration in seconds and peak memory in MB of the step; how the update is cut if that was measured; a prompt and a
    completion with their special tokens."""

    seconds: float
    peak_mb: float
    chunks: str | None
    prompt: str
    completion: str


def why_not_run(trainer: "GRPOExtTrainer") -> str | None:
    """The reason why the step cannot be run without side effects in the user's programs; None if it can."""
    reasons = {
        "rollout_func samples the completions": trainer.rollout_func is not None,
        "tools and environments would be called": bool(trainer.tools) or trainer.environment_factories is not None,
        "prompts contain images": trainer.is_multimodal,
        "FSDP or DeepSpeed prepares the model when training starts": trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled,
        "vLLM samples the completions and reserves its own memory": trainer.use_vllm,
        "the data has no length": not hasattr(trainer.train_dataset, "__len__"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run_worst_case_step(
    trainer: "GRPOExtTrainer", row: dict[str, Any], longest: list[int], first: list[int]
) -> WorstCase:
    """Run one step of the largest shape, and sample one completion to show.

    Args:
        row: row of the dataset that the rollout repeats.
        longest: token ids of the longest prompt.
        first: token ids of the prompt of the shown completion.

    Raises:
        RuntimeError: the step does not fit into memory; the message says which settings make it smaller.
    """
    args = trainer.args
    rows = args.generation_batch_size // args.world_size
    try:
        with without_a_trace(trainer):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            rollout = _rollout(trainer, [row] * rows, longest)
            chunks, peak = None, peak_memory_mb(trainer.accelerator.device)
            micro_batch = rows_of(rollout, _rows_with_most_prompts(trainer, rollout))
            if args.chunk_tokens == "auto" and trainer.shares_prompts:
                chosen = choose_on(trainer, micro_batch)
                trainer.parts.scorer.limits.choose(chosen.tokens)
                chunks = chosen.reason
            update(trainer, micro_batch)
            seconds, peak = time.monotonic() - started, max(peak, peak_memory_mb(trainer.accelerator.device))
            completion = trainer.sample_completion(first)
            limits = trainer.parts.scorer.limits.state_dict()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"One step of the largest shape does not fit into memory: {rows} rows in the sampler and "
            f"{args.per_device_train_batch_size} in the update, with the longest prompt and "
            f"max_completion_length={args.max_completion_length}. Lower chunk_tokens (now {args.chunk_tokens}), "
            f"max_completion_length, max_prompt_tokens (now {args.max_prompt_tokens}), or per_device_train_batch_size "
            f"with more gradient_accumulation_steps. `grpo-ext plan` shows what fits."
        ) from error
    trainer.parts.scorer.limits.load_state_dict(limits)  # what did not fit here would not fit later
    decode = text_tokenizer(trainer.processing_class).decode
    return WorstCase(seconds=seconds, peak_mb=peak, chunks=chunks, prompt=decode(first), completion=decode(completion))


def _rollout(trainer: "GRPOExtTrainer", examples: list[dict[str, Any]], longest: list[int]) -> dict[str, Tensor]:
    """Run TRL's rollout in training mode, with the stages of the run; returns the last one if there are two."""
    stages = tuple(stage for stage in trainer.parts.stages if not isinstance(stage, Resample))
    trainer.parts = replace(trainer.parts, stages=stages)
    trainer.model.train()
    trainer.generation_config.min_new_tokens = trainer.max_completion_length
    replays = any(isinstance(stage, Replay) for stage in stages)
    try:
        rollout = _roll_out(trainer, examples, longest, with_dead_group=False)
        return _roll_out(trainer, examples, longest, with_dead_group=True) if replays else rollout
    finally:
        trainer.generation_config.min_new_tokens = None


def _roll_out(
    trainer: "GRPOExtTrainer", examples: list[dict[str, Any]], longest: list[int], *, with_dead_group: bool
) -> dict[str, Tensor]:
    args, accelerator = trainer.args, trainer.accelerator
    prompts = -(-len(examples) // trainer.num_generations)
    vocabulary = trainer.model.get_input_embeddings().num_embeddings
    sampled = 0  # completions of each prompt so far

    def prompt_ids(rows: int) -> list[list[int]]:
        """The longest prompt, with a different first token for each group of rows and for the second rollout."""
        first = prompts if with_dead_group else 0
        groups = (first + row // -(-rows // prompts) for row in range(rows))
        return [[(longest[0] + group) % vocabulary, *longest[1:]] for group in groups]

    def max_new_tokens(rows: int) -> list[int]:
        return [max(1, trainer.max_completion_length - row % 2) for row in range(rows)]

    def rewards(rows: int) -> Tensor:
        """Rewards that keep groups dead until they cannot be extended further; the first stays dead on request."""
        nonlocal sampled
        width = -(-rows // prompts)
        sampled += width
        rewards_BF = torch.zeros(rows * accelerator.num_processes, len(trainer.reward_funcs), device=accelerator.device)
        if sampled == width and args.num_generations_max is None:
            rewards_BF[::2] = 1.0
        elif args.num_generations_max is not None and sampled >= args.num_generations_max:
            rewards_BF[:] = 1.0
        if with_dead_group:
            rewards_BF[:width] = 0.0
        return rewards_BF

    return trainer.roll_out_with(examples, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, rewards=rewards)


def _rows_with_most_prompts(trainer: "GRPOExtTrainer", rollout: dict[str, Tensor]) -> slice:
    """The micro-batch with the most prompts."""
    size, G = trainer.args.per_device_train_batch_size, trainer.num_generations
    start = max(range(0, len(rollout["prompt_ids"]), size), key=lambda row: (row + size - 1) // G - row // G)
    return slice(start, start + size)
