"""The presets in recipes/ for cards of 8 to 24 GB: each one fits its card, by the plan in its own comment."""

import argparse
import re
import shlex

import pytest

import grpo_ext.recipes.math as recipe
from grpo_ext.cli import plan as command
from grpo_ext.memory.plan import plan_memory
from tests.memory.hub_configs import CONFIGS
from tests.tools.lanes import slow_but
from tests.tools.paths import ROOT

PRESETS = sorted((ROOT / "recipes").glob("gpu_*gb.yaml"))
README = ROOT / "recipes" / "README.md"
GIB = 2**30


def test_one_preset_per_size():
    assert [path.name for path in PRESETS] == ["gpu_12gb.yaml", "gpu_16gb.yaml", "gpu_24gb.yaml", "gpu_8gb.yaml"]


@pytest.mark.parametrize("preset", slow_but(PRESETS, PRESETS[:1]), ids=lambda path: path.stem)
def test_preset_fits_its_card(preset, tmp_path):
    """Guards against a preset that is changed without its plan, or leaves no reserve, and could run out of memory. The
    numbers in its comment must be those of the plan."""
    about, launch, anywhere, plan_says, *others = preset.read_text().splitlines()
    gigabytes = int(re.search(r"\d+", preset.name)[0])
    assert re.findall(r"(\d+) GB", about) == [str(gigabytes)]
    assert launch.split("accelerate launch ")[1] == (
        f"--config_file accelerate_configs/single_gpu.yaml recipes/math.py --config recipes/{preset.name}"
    )
    assert f"grpo-ext train math --config {preset.name} " in anywhere
    comment = " ".join(line.removeprefix("#").removesuffix("\\").strip() for line in others if line.startswith("#"))
    words = shlex.split(re.search(r"grpo-ext plan (--model .*?--gradient_accumulation_steps \d+)", comment)[1])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(words)
    policy, step = command.plan_inputs(options)

    script_args, args, model_args = recipe.parse(["--config", str(preset), "--bf16", "false"])
    assert script_args.dataset_name == "openai/gsm8k"
    assert (policy.model_name_or_path, policy.load_in_4bit) == (model_args.model_name_or_path, model_args.load_in_4bit)
    assert (step.completion, step.generations) == (args.max_completion_length, args.num_generations)
    assert (step.rows, step.accumulation) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    is_auto = args.chunk_tokens == "auto"  # planned with one completion at a time, the least that such a run needs
    assert step.chunk_tokens == (None if is_auto else args.chunk_tokens)
    assert step.gradient_checkpointing == (args.gradient_checkpointing or is_auto)
    assert step.beta == args.beta
    assert args.per_device_eval_batch_size <= step.rows * step.accumulation  # held-out completions need no more memory

    assert options.gpu == gigabytes * GIB
    CONFIGS[policy.model_name_or_path].save_pretrained(tmp_path)
    policy.model_name_or_path = str(tmp_path)
    made = plan_memory(policy, step, device_type="cuda", memory=options.gpu, with_largest=False)
    assert made.fits, made.footprint
    total, room = (f"{amount / GIB:.2f}" for amount in (made.footprint.total, made.budget))
    assert re.findall(r"\d+\.\d+|\d+(?= tok)", plan_says) == [total, room, str(step.prompt)]
    (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| [{preset.name}]"))
    assert row.endswith(f"| {total} GB |")
    assert made.budget == pytest.approx(0.9 * made.memory)
