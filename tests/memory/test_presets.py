"""The presets in recipes/ for cards of 8 to 24 GB: by the plan in its comment, each one fills 75 to 90% of what a run
may use on its card."""

import argparse
import itertools
import re
import shlex

import pytest

import grpo_ext.recipes.math as recipe
from grpo_ext.cli import plan as command
from grpo_ext.memory.plan import plan_memory
from tests.memory.hub_configs import CONFIGS
from tests.tools.lanes import slow_but
from tests.tools.paths import ROOT

PRESETS = sorted((ROOT / "recipes").glob("gpu_*.yaml"))
README = ROOT / "recipes" / "README.md"
GIB = 2**30


def test_the_sizes_of_cards_that_have_a_preset():
    assert [path.stem for path in PRESETS] == ["gpu_12gb", "gpu_16gb", "gpu_16gb_fp16", "gpu_24gb", "gpu_8gb"]


@pytest.mark.parametrize("preset", slow_but(PRESETS, PRESETS[:1]), ids=lambda path: path.stem)
def test_preset_uses_its_card_and_fits(preset, tmp_path):
    """Guards against a preset that is changed without its plan, and then could run out of memory or leave half of the
    card unused. The numbers in its comment must be those of the plan."""
    lines = preset.read_text().splitlines()
    about, launch, anywhere, plan_says, *command_lines = itertools.takewhile(lambda line: line.startswith("#"), lines)
    gigabytes = int(re.search(r"\d+", preset.stem)[0])
    assert re.findall(r"(\d+) GB", about) == [str(gigabytes)]
    assert launch.split("accelerate launch ")[1] == (
        f"--config_file accelerate_configs/single_gpu.yaml recipes/math.py --config recipes/{preset.name}"
    )
    assert f"grpo-ext train math --config {preset.name} " in anywhere
    planned = " ".join(line.removeprefix("#").removesuffix("\\").strip() for line in command_lines)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(shlex.split(planned.removeprefix("grpo-ext plan ")))
    policy, step = command.plan_inputs(options)

    script_args, args, model_args = recipe.parse(["--config", str(preset), "--bf16", "false"])
    assert script_args.dataset_name == "openai/gsm8k"
    assert (policy.model_name_or_path, policy.load_in_4bit) == (model_args.model_name_or_path, model_args.load_in_4bit)
    assert policy.dtype == ("float16" if args.fp16 else None)
    assert (step.prompt, step.completion) == (args.max_prompt_tokens, args.max_completion_length)
    assert (step.rows, step.accumulation) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    is_auto = args.chunk_tokens == "auto"  # planned with one completion at a time, the least that such a run needs
    assert step.chunk_tokens == (None if is_auto else args.chunk_tokens)
    assert step.gradient_checkpointing == (args.gradient_checkpointing or is_auto)
    assert (step.generations, step.beta) == (args.num_generations, args.beta)
    assert args.per_device_eval_batch_size <= step.rows * step.accumulation  # held-out completions need no more memory

    assert 0.9 * gigabytes * GIB <= options.gpu <= gigabytes * GIB  # drivers keep some of a T4's memory
    CONFIGS[policy.model_name_or_path].save_pretrained(tmp_path)
    policy.model_name_or_path = str(tmp_path)
    made = plan_memory(policy, step, device_type="cuda", memory=options.gpu, with_largest=False)
    total, room = (f"{amount / GIB:.2f}" for amount in (made.footprint.total, made.budget))
    assert re.findall(r"\d+\.\d+|\d+(?= tok)", plan_says) == [total, room, str(step.prompt)]
    assert 0.75 <= made.footprint.total / made.budget <= 0.9
    (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| [{preset.name}]"))
    assert row.endswith(f"| {total} of {room} GB |")
    assert made.budget == pytest.approx(0.9 * made.memory)
