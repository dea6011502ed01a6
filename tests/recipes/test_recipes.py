"""All recipes except `recipes/math.py` as users run them, for two steps each, and the data that comes with them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from trl import TrlParser

from grpo_ext import GRPOExtConfig
from grpo_ext.cli import main
from grpo_ext.data import PromptFormat, load_problems
from grpo_ext.data.programs import PROGRAM_FORMAT, with_supported_tests
from grpo_ext.model.load import PolicyConfig
from grpo_ext.recipe import RecipeArguments
from grpo_ext.recipes import dialogue, logic
from grpo_ext.rewards import program_reward
from tests.tools.paths import ROOT

RECIPES = ROOT / "recipes"
TWO_STEPS = (
    "--max_steps 2 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_completion_length 24 "
    "--max_eval_prompts 8 --eval_samples 2 --eval_steps 1 --save_steps 2 --seed 0"
).split()
needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`train("logic", "--flag", ...)`: `grpo-ext train` for two steps; returns the output and the summary."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        main(["train", *arguments, *TWO_STEPS, "--reward_workers", "0", "--output_dir", str(tmp_path)])
        output = capsys.readouterr().out
        assert "held-out pass@1: " in output.strip().splitlines()[-1]
        left = {path.name for path in tmp_path.iterdir()}
        assert left >= {"adapter_model.safetensors", "metrics.jsonl", "curves.png", "summary.json", "checkpoint-2"}
        return output, json.loads((tmp_path / "summary.json").read_text())

    return run


def test_dialogue(tmp_path, train):
    output, summary = train("dialogue")
    assert (summary["recipe"], summary["steps"], summary["k"]) == ("dialogue", 2, 2)
    assert "held out: 8 problems of split 'test'" in output
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= row["dialogue/turns"] <= 6 for row in metrics if "loss" in row)
    for name in ("heldout/pass@1", "heldout/sampled_pass@1"):
        assert [row["step"] for row in metrics if name in row] == [0, 1, 2]


def test_logic(train):
    output, summary = train("logic", "--train_problems", "40")
    assert (summary["recipe"], summary["steps"]) == ("logic", 2)
    assert "40 problems; held out: 8 puzzles of basic_arithmetic" in output
    assert "Question: " in output


def test_an_algorithm_with_a_reward_of_its_own(tmp_path, train):
    """DAPO punishes long completions in training; the held-out accuracy counts right answers only."""
    output, _ = train("logic", "--train_problems", "40", "--algorithm", "dapo")
    assert "dead_groups='resample', mask_truncated_completions=True" in output
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    assert all(-1 <= row["rewards/soft_overlong_punishment_reward/mean"] < 0 for row in steps)
    assert all("resampled_groups" in row for row in steps)


@needs_sandbox
def test_coding(train):
    output, summary = train("coding")
    assert (summary["recipe"], summary["steps"]) == ("coding", 2)
    assert "32 problems; held out: 8 problems taken out of split 'train'" in output


def test_guess_a_number(train):
    """The preset of the game, with the embedded model in place of a chat model. It has no chat template."""
    preset = ["--config", "guess_number.yaml", "--model", str(RECIPES / "tiny_math/model")]
    output, _ = train("dialogue", *preset, "--max_turns", "3")
    assert "80 problems; held out: 8 of 100 numbers" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logic", "--answer_column", "solution"], "--answer_column solution would have no effect: the puzzles are"),
        (["dialogue", "--config", "guess_number.yaml", "--chat", "true"], "--chat true would have no effect"),
        (["math", "--dataset_streaming", "true"], "--dataset_streaming True would have no effect"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_a_recipe_does_not_read_are_refused(train, arguments, message):
    """If they were ignored, a run on other data than the user named would look like a success."""
    with pytest.raises(SystemExit, match=message):
        train(*arguments, "--model", str(RECIPES / "tiny_math/model"), "--dataset_name", "guess_number")


@pytest.mark.parametrize("recipe", ["coding", "dialogue", "logic"])
def test_every_recipe_drops_its_folder_from_the_path(recipe):
    """Like recipes/math.py, which other tests start in every way: otherwise `import math` would find math.py in the
    folder of the script."""

    def guard(path):
        lines = path.read_text().splitlines()
        start, end = lines.index("import sys"), next(i for i, line in enumerate(lines) if line.startswith("sys.path"))
        return [line for line in lines[start : end + 1] if not line.startswith("#")]

    assert guard(RECIPES / f"{recipe}.py") == guard(RECIPES / "math.py")
    assert len(guard(RECIPES / "math.py")) == 4


@pytest.mark.parametrize("preset", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_presets_hold_flags_that_exist(preset, tmp_path):
    """A misspelt key in a GPU preset would stop runs that no test starts."""
    recipe = {
        "guess_number": dialogue.DialogueArguments,
        "tiny_dialogue": dialogue.DialogueArguments,
        "knights_knaves": logic.LogicArguments,
        "smollm2_sums": logic.LogicArguments,
        "tiny_logic": logic.LogicArguments,
    }.get(preset.stem, RecipeArguments)
    (tmp_path / "preset.yaml").write_text(preset.read_text())
    parser = TrlParser((recipe, GRPOExtConfig, PolicyConfig))
    script_args, args, model_args = parser.parse_args_and_config(["--config", str(tmp_path / "preset.yaml")])
    values = {**vars(script_args), **vars(args), **vars(model_args)}
    assert all(values[name] == value for name, value in yaml.safe_load(preset.read_text()).items())
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert rows % args.num_generations == 0
    json.loads(getattr(script_args, "task_options", "{}"))


# Data


@needs_sandbox
def test_every_gold_program_is_right():
    """And each is wrong for the next problem, so the tests tell programs apart."""
    rows = [json.loads(line) for line in (RECIPES / "tiny_coding.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["entry_point"] for row in rows}) == 40
    columns = {name: [row[name] for row in rows] for name in ("entry_point", "inputs", "outputs")}
    programs = [f"```python\n{row['solution']}```" for row in rows]
    assert program_reward(programs, **columns) == [1.0] * 40
    renamed = [
        program.replace(f"def {row['entry_point']}(", f"def {after['entry_point']}(")
        for row, program, after in zip(rows, programs, rows[1:], strict=False)
    ]
    assert sum(program_reward(renamed, **{name: values[1:] for name, values in columns.items()})) == 0


def test_problems_in_the_form_of_mbpp(tmp_path, tokenizer):
    """Only the tests name the function. Problems with tests that the reward does not support are left out."""
    rows = [
        {"prompt": f"Write a function to add {i}.", "code": "...", "test_list": [f"assert plus(1) == {i + 1}"]}
        for i in range(50)
    ]
    rows[7]["test_list"] = ["assert plus(other) > open('x')"]
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path), tokenizer, prompt_format=PROGRAM_FORMAT)
    (train, heldout), note = with_supported_tests("MBPP", problems.train, problems.heldout)
    assert len(train) + len(heldout) == 49
    assert note == "1 problems with unsupported tests were left out"
    number = train[0]["prompt"].partition("add ")[2].partition(".")[0]
    test = f"Your program must pass this test:\nassert plus(1) == {int(number) + 1}"
    assert train[0]["prompt"] == f"Write a function to add {number}.\n{test}"
    unsupported = Dataset.from_list([rows[7]])
    with pytest.raises(ValueError, match="No problem of MBPP has tests that the code reward supports"):
        with_supported_tests("MBPP", train, unsupported)


def test_wording_of_a_chat_model(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    try:
        path = Path(tmp_path / "d.jsonl")
        path.write_text(
            "".join(json.dumps({"question": f"{i}?", "answer": "1"}) + "\n" for i in range(10)), encoding="utf-8"
        )
        prompt_format = PromptFormat(system="Be brief.", question=lambda text, row: f"{text} ({row['answer']})")
        prompt = load_problems(str(path), tokenizer, prompt_format=prompt_format, chat="true").heldout[0]["prompt"]
    finally:
        tokenizer.chat_template = None
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert prompt[0]["content"] == "Be brief."
    assert prompt[1]["content"].endswith("? (1)")
