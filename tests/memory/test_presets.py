"""The presets of recipes/ for cards of 8 to 24 GB: each fits its card, by the plan that its own comment names."""

import argparse
import re
import shlex

import pytest

import recipes.math as recipe
from grpo_ext.cli import plan as command
from grpo_ext.memory.plan import plan
from tests.conftest import ROOT
from tests.memory.hub_configs import CONFIGS

PRESETS = sorted((ROOT / "recipes").glob("gpu_*gb.yaml"))
README = ROOT / "recipes" / "README.md"
GIB = 2**30


def test_there_is_one_for_every_size():
    assert [path.name for path in PRESETS] == ["gpu_12gb.yaml", "gpu_16gb.yaml", "gpu_24gb.yaml", "gpu_8gb.yaml"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_card_by_the_plan_it_names(preset, tmp_path):
    """A preset that was changed without its plan, or does not leave the reserve free, would end out of memory; the
    numbers of its comment are those of the plan."""
    about, launch, plan_says, *others = preset.read_text().splitlines()
    gigabytes = int(re.search(r"\d+", preset.name)[0])
    assert about.endswith(f"for one GPU of {gigabytes} GB. Planned: not yet measured on such a card.")
    assert launch.split("accelerate launch ")[1] == (
        f"--config_file accelerate_configs/single_gpu.yaml recipes/math.py --config recipes/{preset.name}"
    )
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
    assert (step.chunk_tokens, step.gradient_checkpointing) == (args.chunk_tokens, args.gradient_checkpointing)
    assert step.beta == args.beta
    assert args.per_device_eval_batch_size <= step.rows * step.accumulation  # held-out answers take no more than these

    assert options.gpu == gigabytes * GIB
    CONFIGS[policy.model_name_or_path].save_pretrained(tmp_path)
    policy.model_name_or_path = str(tmp_path)
    made = plan(policy, step, device_type="cuda", memory=options.gpu, with_largest=False)
    assert made.fits, made.footprint
    total, room = (f"{amount / GIB:.2f}" for amount in (made.footprint.total, made.room))
    assert plan_says.startswith(
        f"# The plan: {total} GB of {room} (a tenth is left free), for prompts of up to 512 tok"
    )
    assert step.prompt == 512
    (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| [{preset.name}]"))
    assert row.endswith(f"| {total} GB |")
    assert made.room == pytest.approx(0.9 * made.memory)
