"""`--num_generations auto` in a recipe: the largest group that divides the rollout, planned before the config is built.

    asked = asked_for(parser, argv)
    parser.parse_args_and_config(resolved(argv, asked, folder=folder))

TRL's field takes a number only, and a rollout has to be a multiple of it. So the other settings are read first, from
the flags and the file that `--config` names, and the flag is given anew. In a rollout of a given size larger groups
need no more memory, since a prompt is held once for all of its answers: where the largest does not fit, none does.
"""

import os
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from trl import TrlParser

from grpo_ext.machine import GIB
from grpo_ext.memory.plan import Plan, Planner
from grpo_ext.memory.step_shapes import Step
from grpo_ext.model.load import PolicyConfig

AUTO = "auto"
CHOICES = (32, 16, 8, 4)
PROMPT_TOKENS = 512  # that are planned for where `max_prompt_tokens` is not set: no data is read yet


def asked_for(parser: TrlParser, argv: list[str]) -> Namespace:
    """Every setting by its name, from the flags and the file of `--config`; `num_generations` is a number or `auto`."""
    action: Any = next(action for action in parser._actions if action.dest == "num_generations")
    action.type = _number_or_auto
    flags = list(argv)
    if "--config" in flags:
        at = flags.index("--config")
        settings = yaml.safe_load(Path(flags[at + 1]).read_text())
        parser.set_defaults_with_config(**{name: value for name, value in settings.items() if name != "env"})
        del flags[at : at + 2]
    return parser.parse_args(flags)


def _number_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


def resolved(argv: list[str], asked: Namespace, *, folder: str) -> list[str]:
    """The flags, with the number of generations in place of `auto`; as they are where nothing says `auto`.

    Args:
        asked: what `asked_for` gave; a model is named.
        folder: what `$RECIPES` stands for in its name.

    Raises:
        ValueError: no choice divides the rollout, none fits, or the policy cannot be planned.
    """
    if asked.num_generations != AUTO:
        return argv
    asked.model_name_or_path = asked.model_name_or_path.replace("$RECIPES", folder)
    chosen, why = choose(asked)
    if int(os.environ.get("RANK", 0)) == 0:
        print(why)
    return [*argv, "--num_generations", str(chosen)]


def choose(asked: Namespace) -> tuple[int, str]:
    """How many, and why in one sentence.

    Args:
        asked: values by the names of `GRPOExtConfig` and `PolicyConfig`.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = asked.steps_per_generation or asked.gradient_accumulation_steps
    rollout = asked.generation_batch_size or asked.per_device_train_batch_size * accumulation * processes
    dividing = [choice for choice in CHOICES if rollout % choice == 0]
    least = CHOICES[-1]
    if not dividing:
        raise ValueError(
            f"num_generations=auto needs a rollout that is a multiple of {least}, got {rollout} (batch "
            f"{asked.per_device_train_batch_size} x accumulation {accumulation} x {processes} process"
            f"{'es' if processes > 1 else ''}). Nearest: per_device_train_batch_size={-(-rollout // least) * least}."
        )
    device_type, memory, of_what = _here(asked.use_cpu)
    policy = PolicyConfig(**{field.name: getattr(asked, field.name) for field in fields(PolicyConfig) if field.init})
    try:
        planner = Planner(policy, device_type)
    except ValueError as error:
        raise ValueError(f"num_generations=auto needs a plan. {error} Or give a number: num_generations=8.") from None
    most = planner.config.max_position_embeddings - asked.max_completion_length
    step = Step(
        prompt=max(2, min(asked.max_prompt_tokens or PROMPT_TOKENS, most)),
        completion=asked.max_completion_length,
        generations=dividing[0],
        rows=asked.per_device_train_batch_size,
        accumulation=max(1, rollout // (asked.per_device_train_batch_size * processes)),
        chunk_tokens=asked.chunk_tokens,
        gradient_checkpointing=asked.gradient_checkpointing,
        beta=asked.beta,
    )
    made = Plan(step=step, footprint=planner.footprint(step), memory=memory, largest={}, changes=[])
    planned = (
        f"{made.footprint.total / GIB:.2f} GB are planned for prompts of at most {step.prompt} tokens, of "
        f"{made.room / GIB:.2f} GB: {of_what}, less a tenth"
    )
    if not made.fits:
        raise ValueError(
            f"num_generations=auto: a rollout of {rollout} answers does not fit. {planned}. Ask `grpo-ext plan` what "
            f"to change."
        )
    return dividing[0], (
        f"num_generations=auto: {dividing[0]}, the largest of {_listed(CHOICES)} that divides the rollout of {rollout} "
        f"answers, and it fits: {planned}."
    )


def _listed(choices: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(choices)))


def _here(use_cpu: bool) -> tuple[str, float, str]:
    """The device of this process, as plans know it, the bytes of memory to plan for, and what they are."""
    if torch.cuda.is_available() and not use_cpu:
        card = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        return "cuda", card.total_memory, "all of the card"
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = psutil.virtual_memory().available
    return "cpu", free / sharing, "the free memory of this machine" + (f" by {sharing}" if sharing > 1 else "")
