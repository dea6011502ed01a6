"""`--num_generations auto` in a recipe: groups as large as a rollout allows without losing its variety of prompts.

    settings = parse_flags(parser, argv)
    parser.parse_args_and_config(with_group_size(argv, settings, folder=folder))

    rollout, in completions      32    64    128    256
    completions per prompt        4     8     16     32

The rule: the largest of 4, 8, 16 and 32 that divides the rollout and leaves at least 8 prompts in it; 4 if the rollout
has fewer than 32 completions. For a given rollout, larger groups need no more memory, because a prompt is held once for
its whole group. If the size that the rule gives does not fit, no smaller one does.

TRL's field only accepts a number, and the rollout must be a multiple of it. All settings are therefore parsed once,
from the flags and the file of `--config`, to choose the number; `--num_generations NUMBER` is then appended to the
flags.
"""

import os
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import TrlParser

from grpo_ext.console.terminal import show
from grpo_ext.machine import GIB, free_memory_per_process
from grpo_ext.memory.plan import GROUP_SIZES, Plan, Planner
from grpo_ext.memory.step_shapes import StepShape
from grpo_ext.model.load import PolicyConfig

AUTO = "auto"
MIN_PROMPTS = 8  # per rollout
DEFAULT_PROMPT_TOKENS = 512  # assumed if `max_prompt_tokens` is not set: the data is not loaded yet


def parse_flags(parser: TrlParser, argv: list[str]) -> Namespace:
    """All settings by name, from the flags and the file of `--config`; `num_generations` is a number or `auto`."""
    action: Any = next(action for action in parser._actions if action.dest == "num_generations")
    action.type = _number_or_auto
    flags = list(argv)
    if "--config" in flags:
        at = flags.index("--config")
        defaults = read_config(flags[at + 1])
        parser.set_defaults_with_config(**{name: value for name, value in defaults.items() if name != "env"})
        del flags[at : at + 2]
    return parser.parse_args(flags)


def read_config(file: str) -> dict[str, Any]:
    """The settings in the file of `--config`; {} for an empty file.

    Raises:
        SystemExit: the file has no settings of the form `name: value`.
    """
    settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise SystemExit(f"--config {file} must have lines of the form name: value, for example seed: 7.")
    return settings


def _number_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


def with_group_size(argv: list[str], settings: Namespace, *, folder: str) -> list[str]:
    """The flags, with a number in place of `--num_generations auto`; unchanged if that was not requested.

    Args:
        settings: the result of `parse_flags`, with a model name.
        folder: replaces `$RECIPES` in that name.

    Raises:
        ValueError: no group size divides the rollout, the chosen one needs too much memory, or the policy cannot be
            planned.
    """
    if settings.num_generations != AUTO:
        return argv
    settings.model_name_or_path = settings.model_name_or_path.replace("$RECIPES", folder)
    group_size, reason = choose_group_size(settings)
    if int(os.environ.get("RANK", 0)) == 0:
        show(reason)
    return [*argv, "--num_generations", str(group_size)]


def auto_size(rollout: int) -> int | None:
    """The group size for a rollout of that many completions; None if no size divides it."""
    dividing = [size for size in GROUP_SIZES if rollout % size == 0]
    with_prompts = [size for size in dividing if rollout // size >= MIN_PROMPTS]
    return max(with_prompts or dividing[:1], default=None)


def mixed_share(group_size: int, pass_rate: float) -> float:
    """The expected share of groups with both right and wrong completions, if a completion is right with probability
    `pass_rate`, independently of the others: 1 - p^G - (1 - p)^G. Other groups carry no gradient."""
    return 1 - pass_rate**group_size - (1 - pass_rate) ** group_size


def choose_group_size(settings: Namespace) -> tuple[int, str]:
    """The group size, and the reason in one sentence.

    Args:
        settings: the fields of `GRPOExtConfig` and `PolicyConfig`.

    Raises:
        ValueError: as in `with_group_size`.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = settings.steps_per_generation or settings.gradient_accumulation_steps
    rollout = settings.generation_batch_size or settings.per_device_train_batch_size * accumulation * processes
    chosen, least = auto_size(rollout), GROUP_SIZES[0]
    if chosen is None:
        raise ValueError(
            f"num_generations=auto needs a rollout that is a multiple of {least}, got {rollout} (batch "
            f"{settings.per_device_train_batch_size} x accumulation {accumulation} x {processes} process"
            f"{'es' if processes > 1 else ''}). Nearest: per_device_train_batch_size={-(-rollout // least) * least}."
        )
    device_type, memory, which_memory = _this_device(settings.use_cpu)
    policy = PolicyConfig(**{field.name: getattr(settings, field.name) for field in fields(PolicyConfig) if field.init})
    try:
        planner = Planner(policy, device_type)
    except ValueError as error:
        raise ValueError(f"num_generations=auto needs a plan. {error} Or give a number: num_generations=8.") from None
    max_prompt = planner.config.max_position_embeddings - settings.max_completion_length
    step = StepShape(
        prompt=max(2, min(settings.max_prompt_tokens or DEFAULT_PROMPT_TOKENS, max_prompt)),
        completion=settings.max_completion_length,
        generations=chosen,
        rows=settings.per_device_train_batch_size,
        accumulation=max(1, rollout // (settings.per_device_train_batch_size * processes)),
        chunk_tokens=None if isinstance(settings.chunk_tokens, str) else settings.chunk_tokens,
        gradient_checkpointing=settings.gradient_checkpointing or settings.chunk_tokens == "auto",
        beta=settings.beta,
    )
    plan = Plan(step=step, footprint=planner.footprint(step), memory=memory, largest={}, changes=[])
    planned = (
        f"{plan.footprint.total / GIB:.2f} GB planned for prompts of up to {step.prompt} tokens, out of "
        f"{plan.budget / GIB:.2f} GB ({which_memory}, less a tenth)"
    )
    if not plan.fits:
        raise ValueError(
            f"num_generations=auto: a rollout of {rollout} answers, {chosen} per prompt, does not fit: {planned}. "
            f"`grpo-ext plan` suggests what to change."
        )
    return chosen, (
        f"num_generations=auto: {chosen}, for {rollout // chosen} prompts per rollout of {rollout} answers. The rule: "
        f"the largest of {', '.join(map(str, GROUP_SIZES))} that divides the rollout and leaves at least {MIN_PROMPTS} "
        f"prompts, or {least} if the rollout has fewer than {least * MIN_PROMPTS} answers. It fits: {planned}."
    )


def _this_device(use_cpu: bool) -> tuple[str, float, str]:
    """Device type of this process, the memory to plan for in bytes, and which memory that is."""
    if torch.cuda.is_available() and not use_cpu:
        free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))
        return "cuda", free, "the free memory of the card"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shared = f", shared by {processes} processes" if processes > 1 else ""
    return "cpu", free_memory_per_process(), f"the free memory of this machine{shared}"
