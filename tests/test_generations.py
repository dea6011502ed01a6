"""`--num_generations auto` of a recipe: what it becomes, and that the batch arithmetic stays valid."""

import psutil
import pytest
from conftest import ROOT
from trl import TrlParser

import recipes.math as recipe
from grpo_ext import GRPOExtConfig
from grpo_ext.policy.loading import PolicyConfig
from grpo_ext.recipe import RecipeArguments
from grpo_ext.run import generations
from grpo_ext.run.memory import RESERVE

AUTO = ["--num_generations", "auto"]


@pytest.fixture
def available(monkeypatch):
    """`available(gigabytes)`: so much memory is left on this machine."""

    def leave(gigabytes):
        memory = psutil.virtual_memory()._replace(available=int(gigabytes * 2**30))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return leave


def batch(rows, accumulation=1):
    return ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]


@pytest.mark.parametrize(("rows", "accumulation", "chosen"), [(8, 1, 8), (8, 2, 16), (12, 1, 4), (16, 4, 32)])
def test_the_largest_that_divides_the_rollout(rows, accumulation, chosen, available, capsys):
    """TRL refuses a rollout that is no multiple of it, after everything was loaded."""
    available(64)
    _, args, _ = recipe.parse([*AUTO, *batch(rows, accumulation)])
    assert args.num_generations == chosen
    assert args.generation_batch_size % chosen == 0
    said = capsys.readouterr().out
    assert said.startswith(f"num_generations=auto: {chosen}, the largest of 4")
    assert said.count("\n") == 1
    assert f"{rows * accumulation // chosen} x {chosen} answers a rollout" in said


def test_a_number_stays_what_it_is(capsys):
    _, args, _ = recipe.parse(["--num_generations", "4"])
    assert args.num_generations == 4
    assert "num_generations=auto" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipe.parse(["--num_generations", "many"])


def test_a_config_file_may_say_auto_and_flags_win(tmp_path, available):
    """The file is read before TRL reads it: its other settings must count, too."""
    available(64)
    settings = "model_name_or_path: $RECIPES/tiny_math/model\ndataset_name: d\nper_device_train_batch_size: 4\n"
    (tmp_path / "c.yaml").write_text(settings + "gradient_accumulation_steps: 4\nnum_generations: auto\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert recipe.parse(config)[1].num_generations == 16
    assert recipe.parse([*config, "--num_generations", "8"])[1].num_generations == 8
    assert recipe.parse([*config, "--gradient_accumulation_steps", "2"])[1].num_generations == 8


def test_processes_share_rollout_and_memory(monkeypatch, available, capsys):
    """Two processes of one machine: twice the rollout, half of the memory for each, and one of them speaks."""
    available(64)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    folder = str(ROOT / "recipes")
    parser = TrlParser((RecipeArguments, GRPOExtConfig, PolicyConfig))
    argv = ["--config", f"{folder}/tiny_math.yaml", *AUTO, *batch(8), "--output_dir", "x"]
    assert generations.with_generations(parser, argv, folder=folder)[-1] == "16"
    assert "of 32.00 GB" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    generations.with_generations(parser, argv, folder=folder)
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_not_taken(monkeypatch, available):
    """Where a rollout of several micro-batches is drawn at once, memory differs by choice: each is asked."""
    needs = {32: 5.0, 16: 3.0, 8: 2.0, 4: 1.0}
    asked = []

    class Known(generations.Planner):
        def _footprint(self, step):
            asked.append(step.generations)

            class Needs:
                total = needs[step.generations] * 2**30

            return Needs

    monkeypatch.setattr(generations, "Planner", Known)
    available(3.1 / (1 - RESERVE))
    assert recipe.parse([*AUTO, *batch(8, 4)])[1].num_generations == 16
    assert asked == [32, 16]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (batch(6), r"multiple of 4, got 6 \(batch 6 x accumulation 1 x 1 process\)\. Nearest: .*batch_size=8"),
        (["--use_peft", "false"], "got use_peft=False"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message):
        recipe.parse([*AUTO, *flags])


def test_a_machine_that_is_too_small(available):
    """By name, before a model is loaded, with what is missing."""
    available(0.01)
    with pytest.raises(ValueError, match=r"none of 4, 8 fits\. 0\.\d+ GB are planned for \d, 0\.01 GB are there"):
        recipe.parse([*AUTO, *batch(8)])
