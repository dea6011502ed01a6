"""`--num_generations auto` of a recipe: which number it becomes, and that the batch arithmetic stays valid."""

from itertools import pairwise

import psutil
import pytest
import torch
from trl import TrlParser

import grpo_ext.recipes.math as recipe
from grpo_ext import GRPOExtConfig
from grpo_ext.memory.auto_group_size import auto_size, mixed_share, parse_flags, with_group_size
from grpo_ext.memory.plan import GROUP_SIZES, Planner
from grpo_ext.memory.step_shapes import StepShape
from grpo_ext.model.load import PolicyConfig
from grpo_ext.recipe import RecipeArguments
from tests.tools.lanes import slow_but, thinned
from tests.tools.paths import ROOT

AUTO = ["--num_generations", "auto"]
FOLDER = str(ROOT / "recipes")


@pytest.fixture
def available(monkeypatch):
    """`available(gigabytes)` sets the free memory of this machine."""

    def set_free_memory(gigabytes):
        memory = psutil.virtual_memory()._replace(available=int(gigabytes * 2**30))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return set_free_memory


def batch(rows, accumulation=1):
    return ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [(8, 4), (12, 4), (28, 4), (32, 4), (40, 4), (64, 8), (72, 8), (96, 8), (128, 16), (256, 32), (288, 32), (512, 32)],
)
def test_the_rule(rollout, expected):
    """A step of few prompts follows their noise, and small groups are often dead: at least 8 prompts, then the largest
    groups. Below 32 answers there are fewer than 8 prompts with any size, and 4 leaves the most."""
    assert auto_size(rollout) == expected


@pytest.mark.parametrize(("rows", "accumulation", "expected"), slow_but([(8, 8, 8), (12, 1, 4)], [(8, 8, 8)]))
def test_one_line_reports_the_rule_the_choice_and_the_memory(rows, accumulation, expected, available, capsys):
    """TRL refuses a rollout that is not a multiple of the group size, after everything is loaded."""
    available(64)
    _, args, _ = recipe.parse([*AUTO, *batch(rows, accumulation)])
    rollout = rows * accumulation
    assert args.num_generations == expected
    assert args.generation_batch_size == rollout
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith(f"num_generations=auto: {expected}, for {rollout // expected} prompts per rollout of ")
    assert "at least 8 prompts" in printed
    assert "4, 8, 16, 32" in printed
    assert "It fits: 0." in printed
    assert "out of 57.60 GB (the free memory of this machine, less a tenth)" in printed


@pytest.mark.parametrize(
    ("size", "pass_rate", "share"), [(2, 0.5, 0.5), (4, 0.5, 0.875), (4, 0.1, 0.3438), (8, 0.1, 0.5695)]
)
def test_share_of_mixed_groups(size, pass_rate, share):
    """By hand, and against groups drawn at random."""
    assert mixed_share(size, pass_rate) == pytest.approx(share, abs=5e-5)
    right = torch.rand(100_000, size, generator=torch.Generator().manual_seed(0)) < pass_rate
    drawn = (right.any(dim=1) & ~right.all(dim=1)).float().mean().item()
    assert drawn == pytest.approx(share, abs=0.01)


@pytest.fixture(scope="module")
def planner():
    """For the embedded model on a CPU; shared, since it caches what it has counted."""
    return Planner(PolicyConfig(model_name_or_path=f"{FOLDER}/tiny_math/model"), "cpu")


IN_CHUNKS, AT_ONCE = {"chunk_tokens": 104}, {"gradient_checkpointing": False, "rows": 32, "accumulation": 1}


@pytest.mark.slow
@pytest.mark.parametrize("options", thinned([IN_CHUNKS, AT_ONCE], [AT_ONCE]))
def test_larger_groups_need_no_more_memory(planner, options):
    """Otherwise a smaller group might fit when the largest does not, and `auto` would refuse a run that can train."""
    sizes = {"rows": 8, "accumulation": 4, "prompt": 40, "completion": 12} | options
    needs = [planner.footprint(StepShape(generations=size, **sizes)).total for size in GROUP_SIZES]
    assert all(larger <= smaller for smaller, larger in pairwise(needs))
    assert needs[-1] < needs[0]


def test_a_number_is_left_unchanged(capsys):
    _, args, _ = recipe.parse(["--num_generations", "4"])
    assert args.num_generations == 4
    assert "num_generations=auto" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipe.parse(["--num_generations", "many"])


@pytest.mark.slow
def test_auto_in_a_config_file_and_flags_that_override_it(tmp_path, available):
    """The file is parsed before TRL parses it, and its other settings must count too."""
    available(64)
    settings = "model_name_or_path: $RECIPES/tiny_math/model\ndataset_name: d\nper_device_train_batch_size: 16\n"
    (tmp_path / "c.yaml").write_text(settings + "gradient_accumulation_steps: 8\nnum_generations: auto\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert recipe.parse(config)[1].num_generations == 16
    assert recipe.parse([*config, "--num_generations", "32"])[1].num_generations == 32
    assert recipe.parse([*config, "--gradient_accumulation_steps", "4"])[1].num_generations == 8


def test_processes_share_rollout_and_memory(monkeypatch, available, capsys):
    """Two processes on one machine: twice the rollout, half the memory for each, and only one of them prints."""
    available(64)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    argv = ["--config", f"{FOLDER}/tiny_math.yaml", *AUTO, *batch(8, 8), "--output_dir", "x"]
    settings = parse_flags(TrlParser((RecipeArguments, GRPOExtConfig, PolicyConfig)), argv)
    assert with_group_size(argv, settings, folder=FOLDER)[-1] == "16"
    memory = "28.80 GB (the free memory of this machine, shared by 2 processes, less a tenth)"
    assert memory in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with_group_size(argv, settings, folder=FOLDER)
    assert capsys.readouterr().out == ""


def test_memory_that_others_use_on_the_card(monkeypatch, capsys):
    """A desktop takes a part of its card, and a plan for the whole card would run out of memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    argv = ["--config", f"{FOLDER}/tiny_math.yaml", *AUTO, *batch(8, 8), "--output_dir", "x", "--use_cpu", "false"]
    settings = parse_flags(TrlParser((RecipeArguments, GRPOExtConfig, PolicyConfig)), argv)
    assert with_group_size(argv, settings, folder=FOLDER)[-1] == "8"
    assert "out of 5.40 GB (the free memory of the card, less a tenth)" in capsys.readouterr().out


@pytest.mark.slow
def test_planned_prompt_length(available, capsys):
    """The embedded model has 256 positions; `max_prompt_tokens` is a better bound if it is set."""
    available(64)
    recipe.parse([*AUTO, *batch(8), "--max_completion_length", "16"])
    assert "for prompts of up to 240 tokens" in capsys.readouterr().out
    recipe.parse([*AUTO, *batch(8), "--max_completion_length", "16", "--max_prompt_tokens", "50"])
    assert "for prompts of up to 50 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (batch(6), r"multiple of 4, got 6 \(batch 6 x accumulation 1 x 1 process\)\. Nearest: .*batch_size=8"),
        (["--use_peft", "false"], r"needs a plan\. .* got use_peft=False.* Or give a number: num_generations=8"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message):
        recipe.parse([*AUTO, *flags])


@pytest.mark.parametrize("flags", [["--dataset_name", "d"], ["--model_name_or_path", "m"]])
def test_missing_model_or_data_is_the_error_of_the_recipe(flags, capsys):
    """Its own message, not an error about `auto`."""
    with pytest.raises(SystemExit):
        recipe.parse([*AUTO, *flags])
    assert "give both --model_name_or_path and --dataset_name" in capsys.readouterr().err


def test_a_machine_with_too_little_memory(available):
    """Refused before a model is loaded, with the memory needed and available."""
    available(0.01)
    message = (
        r"rollout of 8 answers, 4 per prompt, does not fit: 0\.\d+ GB planned .*, out of 0\.01 GB \(the free memory"
    )
    with pytest.raises(ValueError, match=message):
        recipe.parse([*AUTO, *batch(8)])


def test_outside_of_recipes_auto_is_refused():
    """TRL would raise a TypeError in its batch arithmetic."""
    with pytest.raises(ValueError, match=r"num_generations='auto' must be a number of 2 or more, for example 8\."):
        GRPOExtConfig("x", num_generations="auto")
