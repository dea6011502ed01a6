"""`--num_generations auto` in a recipe: as many answers to a prompt as fit, decided before the config is built.

    argv = with_generations(parser, argv)
    parser.parse_args_and_config(argv)

TRL's field takes a number only, and a rollout has to be a multiple of it. So the other settings are read first, from
the flags and the file that `--config` names, and the flag is given anew.
"""

import os
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from trl import TrlParser

from grpo_ext.policy.loading import PolicyConfig
from grpo_ext.run.memory import RESERVE, Planner
from grpo_ext.run.passes import Step

AUTO = "auto"
CHOICES = (32, 16, 8, 4)
PROMPT_TOKENS = 512  # that are planned for: no data is read yet
GIB = 2**30


def with_generations(parser: TrlParser, argv: list[str], *, folder: str = "") -> list[str]:
    """The flags, with the number of generations in place of `auto`; as they are where nothing says `auto`.

    Args:
        parser: of the recipe; its `--num_generations` takes `auto` from now on.
        folder: what `$RECIPES` stands for in the name of the model.

    Raises:
        ValueError: no choice divides the rollout, none fits, or the policy cannot be planned.
    """
    action: Any = next(action for action in parser._actions if action.dest == "num_generations")
    action.type = _number_or_auto
    flags = list(argv)
    if "--config" in flags:
        at = flags.index("--config")
        settings = yaml.safe_load(Path(flags[at + 1]).read_text())
        parser.set_defaults_with_config(**{name: value for name, value in settings.items() if name != "env"})
        del flags[at : at + 2]
    asked = parser.parse_args(flags)
    if asked.num_generations != AUTO:
        return argv
    asked.model_name_or_path = asked.model_name_or_path.replace("$RECIPES", folder)
    chosen, why = choose(asked)
    if int(os.environ.get("RANK", 0)) == 0:
        print(why)
    return [*argv, "--num_generations", str(chosen)]


def _number_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


def choose(asked: Namespace) -> tuple[int, str]:
    """How many, and why in one sentence.

    Args:
        asked: values by the names of `GRPOExtConfig` and `PolicyConfig`.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = asked.steps_per_generation or asked.gradient_accumulation_steps
    rollout = asked.generation_batch_size or asked.per_device_train_batch_size * accumulation * processes
    dividing = [choice for choice in CHOICES if rollout % choice == 0]
    if not dividing:
        raise ValueError(
            f"num_generations=auto needs a rollout that is a multiple of {CHOICES[-1]}, got {rollout} (batch "
            f"{asked.per_device_train_batch_size} x accumulation {accumulation} x {processes} process"
            f"{'es' if processes > 1 else ''}). Nearest: per_device_train_batch_size={-(-rollout // 4) * 4}."
        )
    device_type, memory = _here(asked.use_cpu)
    policy = PolicyConfig(**{field.name: getattr(asked, field.name) for field in fields(PolicyConfig) if field.init})
    planner = Planner(policy, device_type)
    step = Step(
        prompt=max(2, min(PROMPT_TOKENS, planner.config.max_position_embeddings - asked.max_completion_length)),
        completion=asked.max_completion_length,
        generations=dividing[0],
        rows=asked.per_device_train_batch_size,
        accumulation=max(1, rollout // (asked.per_device_train_batch_size * processes)),
        chunk_tokens=asked.chunk_tokens,
        gradient_checkpointing=asked.gradient_checkpointing,
        beta=asked.beta,
    )
    room = (1 - RESERVE) * memory
    needs = {}
    for choice in dividing:
        needs[choice] = planner.footprint(replace(step, generations=choice)).total
        if needs[choice] <= room:
            return choice, (
                f"num_generations=auto: {choice}, the largest of {_listed(dividing)} that fits. Planned are "
                f"{needs[choice] / GIB:.2f} of {memory / GIB:.2f} GB, for prompts of at most {step.prompt} tokens, "
                f"{rollout // choice} x {choice} answers a rollout."
            )
    least = min(needs, key=lambda choice: needs[choice])
    raise ValueError(
        f"num_generations=auto: none of {_listed(dividing)} fits. {needs[least] / GIB:.2f} GB are planned for {least}, "
        f"{room / GIB:.2f} GB are there with {RESERVE:.0%} left free. Ask `grpo-ext plan` what to change."
    )


def _listed(choices: list[int]) -> str:
    return ", ".join(map(str, sorted(choices)))


def _here(use_cpu: bool) -> tuple[str, float]:
    """The device of this process, as plans know it, and its memory: all of a card; of the host, what is available."""
    if torch.cuda.is_available() and not use_cpu:
        return "cuda", torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
    return "cpu", psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
