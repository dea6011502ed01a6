"""`grpo-ext train`: which recipe it starts, with which flags, and what it refuses before anything is loaded."""

import json
import shutil

import pytest

from grpo_ext.cli import main
from grpo_ext.recipe import RecipeArguments, parse_arguments
from tests.tools.paths import ROOT, TINY_MODEL

ROWS = {
    "math": {"question": "1+{}?", "answer": "{}"},
    "coding": {"text": "Write f, which returns its argument.", "test_list": ["assert f({}) == {}"], "code": "{}"},
}
needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is missing: apt install bubblewrap")
SHORT = "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 8 --max_eval_prompts 4 --use_cpu".split()


def parse(*flags):
    """The arguments of the math recipe."""
    return parse_arguments(
        list(flags), "math", str(ROOT / "recipes"), embedded="tiny_math.yaml", arguments=RecipeArguments
    )


@pytest.mark.parametrize("recipe", ["math", pytest.param("coding", marks=needs_sandbox)])
def test_the_columns_choose_the_recipe(tmp_path, capsys, recipe):
    """MBPP has a `code` column, which other data sets use for the answer of a problem: tests of programs win."""
    rows = [json.dumps(ROWS[recipe]).replace("{}", str(n)) for n in range(12)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = str(tmp_path / "problems.jsonl")
    main(["train", data, "--model", str(TINY_MODEL), *SHORT, "--dry_run", "--output_dir", str(tmp_path / "run")])
    output = capsys.readouterr().out.replace("\n", "")
    assert f"recipe {recipe}: '{data}' has" in output
    assert "dry run: all checks passed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maths"], r"'maths' is neither a recipe \(math, coding, logic, dialogue\) nor a file"),
        (["someone/problems"], "which model\\? For example: grpo-ext train someone/problems --model "),
        (["{data}"], "which model\\? For example: grpo-ext train .*csv --model "),
        (["math", "--config", "gpu_9gb.yaml"], "gpu_9gb.yaml: there is no such file. Presets.*gpu_8gb.yaml"),
    ],
    ids=["neither", "Hub data without a model", "file without a model", "no such preset"],
)
def test_what_is_refused(tmp_path, arguments, message):
    (tmp_path / "problems.csv").write_text("question,answer\n1+1?,2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        main(["train", *(text.format(data=tmp_path / "problems.csv") for text in arguments)])


@pytest.mark.parametrize("model", [["--model"], ["--model-name-or-path"], ["--model_name_or_path"]], ids=" ".join)
def test_every_spelling_of_the_model(tmp_path, model, capsys):
    """TRL's parser accepts hyphens, but the recipe took such a run for the embedded one, with its settings."""
    rows = "".join(json.dumps(ROWS["math"]).replace("{}", str(n)) + "\n" for n in range(12))
    (tmp_path / "problems.jsonl").write_text(rows, encoding="utf-8")
    _, args, model_args = parse("--dataset-name", "d", *model, "m")
    assert (args.max_steps, args.learning_rate, model_args.model_name_or_path) == (500, 1e-5, "m")
    run = ["--dry_run", "--output_dir", str(tmp_path / "run"), *SHORT]
    main(["train", str(tmp_path / "problems.jsonl"), *model, str(TINY_MODEL), *run])
    assert "dry run: all checks passed" in capsys.readouterr().out


def test_epochs_replace_the_default_number_of_steps(tmp_path):
    """`max_steps` wins over epochs in transformers, so recipes ignored `num_train_epochs`, as a flag or in a file."""
    task = ["--model_name_or_path", "m", "--dataset_name", "d"]
    (tmp_path / "epochs.yaml").write_text("num_train_epochs: 2\n", encoding="utf-8")
    for flags in (["--num_train_epochs", "2"], ["--config", str(tmp_path / "epochs.yaml")]):
        args = parse(*task, *flags)[1]
        assert (args.max_steps, args.num_train_epochs) == (-1, 2)
    assert parse(*task, "--num-train-epochs=2", "--max_steps", "7")[1].max_steps == 7
    assert (parse(*task)[1].max_steps, parse(*task)[1].num_train_epochs) == (500, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "empty.yaml"], "give both --model_name_or_path and --dataset_name"),
        (
            ["--config", "empty.yaml", "--model", "m", "--dataset_name", "d", "--eval_samples", "-1"],
            "must be 0 or more",
        ),
        (["--max_eval_prompts", "0"], "--max_eval_prompts 0 must be 1 or more"),
        (["--config", "list.yaml"], "--config list.yaml must have lines of the form name: value"),
    ],
    ids=["empty file", "samples", "held-out problems", "no settings"],
)
def test_settings_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("# seed: 7\n")
    (tmp_path / "list.yaml").write_text("- seed\n- 7\n")
    with pytest.raises(SystemExit) as refused:
        parse(*flags)
    assert message in f"{refused.value} {capsys.readouterr().err}"


def test_an_error_of_the_training_keeps_its_traceback(tmp_path):
    """Other commands print an error as one line, which would hide the place of a fault in a reward or a callback."""
    (tmp_path / "problems.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 4, encoding="utf-8")
    data = ["--dataset_name", str(tmp_path / "problems.jsonl"), "--answer_column", "no_such_column"]
    with pytest.raises(ValueError, match="no_such_column"):
        main(["train", "math", *data, "--model", str(TINY_MODEL), "--output_dir", str(tmp_path / "run")])


def test_a_preset_is_found_by_its_name(tmp_path, monkeypatch):
    """From any folder; a file of the user with the same name is preferred, and flags win over both."""
    monkeypatch.chdir(tmp_path)
    flags = ["--config=gpu_8gb.yaml", "--seed", "7"]
    _, args, model_args = parse(*flags)
    assert (args.seed, model_args.load_in_4bit) == (7, True)
    (tmp_path / "gpu_8gb.yaml").write_text(f"model_name_or_path: {TINY_MODEL}\ndataset_name: x\nseed: 3\n")
    _, args, model_args = parse(*flags)
    assert (args.seed, model_args.model_name_or_path) == (7, str(TINY_MODEL))


def test_values_of_the_user_win_over_the_algorithm(tmp_path, capsys):
    """From a flag or the file of `--config`, also if a value is the default of its field."""
    (tmp_path / "mine.yaml").write_text("model_name_or_path: m\ndataset_name: d\nalgorithm: dapo\nepsilon: 0.1\n")
    _, args, _ = parse("--config", str(tmp_path / "mine.yaml"), "--beta", "0.1")
    assert (args.loss_type, args.epsilon, args.epsilon_high, args.beta) == ("dapo", 0.1, 0.28, 0.1)
    output = " ".join(capsys.readouterr().out.split())
    assert "algorithm dapo (DAPO, arXiv:2503.14476" in output
    assert output.endswith("replaced by you: epsilon=0.1, beta=0.1")
    _, args, _ = parse("--config", "gpu_8gb.yaml", "--algorithm", "dapo", "--epsilon", "0.1")
    assert (args.epsilon, args.epsilon_high, args.beta) == (0.1, 0.28, 0.0)  # the preset has another beta
    _, args, _ = parse("--algorithm", "gspo")
    assert (args.importance_sampling_level, args.epsilon, args.learning_rate) == ("sequence", 3e-4, 1e-3)
    with pytest.raises(SystemExit):
        parse("--algorithm", "ppo")
