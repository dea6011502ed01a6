"""The project's frame: what lies at the top level, what the README promises, and the TRL methods we build on."""

import inspect
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import trl
import yaml

from grpo_ext import GRPOExtTrainer
from tests.checkpoints import killed_runs
from tests.checkpoints import test_checkpoint as checkpoint_cases
from tests.checkpoints import test_resume as resume_cases
from tests.checks import test_preflight as preflight_cases
from tests.conftest import ROOT
from tests.distributed import two_resumed
from tests.rewards import test_logic as logic_cases
from tests.rewards import test_math_answer as math_cases
from tests.rewards import test_program as program_cases
from tests.rewards import test_rewards_fuzz as fuzz
from tests.rewards import test_sandbox as sandbox_cases
from tests.trainer import test_config as config_cases

TOP_LEVEL = set(
    "grpo_ext rewards recipes tests accelerate_configs pyproject.toml "
    "README.md LICENSE CHANGELOG.md CONTRIBUTING.md Makefile constraints.txt .ci .gitignore".split()
)
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "recipes/FAQ.md",
    "recipes/tiny_math/README.md",
    "tests/benchmarks/README.md",
)

# The methods of TRL's trainer that we override or call, with the parameters that we know them by.
TRL_METHODS = {
    "_generate": "self prompts",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "self inputs",
    "_prepare_inputs": "self generation_batch",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "_compute_loss": "self model inputs",
    "_get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
    "training_step": "self model inputs num_items_in_batch",
    "log": "self logs start_time",
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "_get_train_sampler": "self dataset",
    "_run_epoch": (
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "_maybe_log_save_evaluate": (
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate"
    ),
    "_get_output_dir": "self trial",
    "_save": "self output_dir state_dict",
    "_save_checkpoint": "self model trial",
    "create_model_card": "self model_name dataset_name tags",
    "init_hf_repo": "self token private",
    "push_to_hub": "self commit_message blocking token revision private kwargs",
    "_push_from_checkpoint": "self checkpoint_folder",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "self checkpoint",
    "get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold",
}


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def test_the_top_level_holds_what_was_agreed():
    assert {path.partition("/")[0] for path in tracked_files()} == TOP_LEVEL


@pytest.mark.parametrize("name", TRL_METHODS)
def test_the_methods_of_trl_are_those_we_know(name):
    parameters = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)
    assert parameters == TRL_METHODS[name].split(), (
        f"TRL {version('trl')} changed GRPOTrainer.{name}; grpo-ext was checked with 1.16.0. Read the new method, "
        f"adapt grpo_ext/mechanisms or grpo_ext/trainer.py, then this table."
    )


def test_every_override_is_in_the_table():
    classes = GRPOExtTrainer.__mro__[: GRPOExtTrainer.__mro__.index(trl.GRPOTrainer)]
    ours = {name for kind in classes for name, value in vars(kind).items() if inspect.isfunction(value)}
    overridden = {name for name in ours if hasattr(trl.GRPOTrainer, name)} - {"__init__"}
    assert overridden <= set(TRL_METHODS)


def test_no_file_is_too_long_to_say_one_thing():
    long = {
        path: lines
        for path in tracked_files()
        if path.endswith(".py") and path.startswith(("grpo_ext", "rewards", "recipes"))
        if (lines := len((ROOT / path).read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_commands_of_the_documents_exist(document):
    text = (ROOT / document).read_text()
    files = set(re.findall(r"(?<![\w/.])((?:grpo_ext|rewards|recipes|tests|accelerate_configs)/[\w./-]*\w)", text))
    links = set(re.findall(r"\]\((?!https?://|#)([^)#]+)", text))
    missing = [path for path in files if not (ROOT / path).exists()]
    missing += [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert not missing
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_python_of_the_readme_runs(tmp_path):
    """The drop-in example, as printed, with the embedded model in place of the reader's own."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = (
        block.replace('"Qwen/Qwen2.5-0.5B"', repr(str(ROOT / "recipes/tiny_math/model")))
        .replace('load_dataset("openai/gsm8k", "main", split="train")', "embedded()")
        .replace('"gsm8k-lora"', f"{str(tmp_path)!r}, max_steps=1, max_completion_length=8")
    )
    assert code.count("recipes/tiny_math/model") == 1
    preamble = f"""
from datasets import load_dataset
def embedded():
    return load_dataset({str(ROOT / "recipes/tiny_math/data")!r}, split="train")
"""
    done = subprocess.run(
        [sys.executable, "-c", preamble + code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.jsonl").exists()


def test_accelerate_configs_say_when_to_use_them():
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert path.read_text().startswith("# For "), path
        assert yaml.safe_load(path.read_text())["num_machines"] == 1


def test_an_old_python_gets_one_line(tmp_path):
    """`make` with a Python before 3.11 says so before it installs anything."""
    old = tmp_path / "python3.9"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        '"import sys; sys.version_info = (3, 9, 1); sys.version = \'3.9.1 (old)\'; exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    done = subprocess.run(["make", "math", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == ["grpo-ext needs Python 3.11 or newer, this is 3.9.1. Try: make PYTHON=python3.11"]


def test_nothing_is_installed_twice():
    """After an installation newer than the package files, make has nothing to install."""
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    if (ROOT / ".venv" / ".tools").exists():
        assert "pip install" not in done.stdout


def test_figures_of_the_readme_are_those_of_the_tests():
    """Cases come and go; the table of what was tried must say how many there are."""
    tried = [
        f"{len(math_cases.CASES) + len(math_cases.HOSTILE) + len(math_cases.COPIES)} answers",
        f"{len(program_cases.DOUBLES)} programs by their calls, {len(program_cases.STREAMS)} by their output, "
        f"{len(program_cases.VALUES)} returned values, {len(program_cases.ASSERTS)} forms of asserts",
        f"{len(sandbox_cases.ESCAPES) + len(sandbox_cases.HARMFUL)} attempts to get out of it or to do harm, "
        f"{len(sandbox_cases.ESCAPES)} of which succeed without it, and {len(sandbox_cases.BEHAVIOURS)} behaviours",
        f"the gold answers of {len(logic_cases.TASKS)} tasks",
        f"{fuzz.DIFFERENT:,} mutated completions",
        f"{len(config_cases.IMPOSSIBLE)} combinations are refused by name",
        # and two that need more than a table: GPUs, and a vocabulary
        f"{len(preflight_cases.REFUSED) + 2} kinds are refused before weights are loaded; "
        f"{len(preflight_cases.UNWISE)} that are only unwise",
        f"{len(preflight_cases.FAILING)} kinds of failure, with and without worker processes",
        f"under {len(preflight_cases.REHEARSED)} settings",
        f"{killed_runs.KILLS} kills at random moments, {checkpoint_cases.DAMAGED} damages to the files",
        f"{len(resume_cases.MATRIX)} settings resumed in one process and {len(two_resumed.CASES)} in two",
    ]
    readme = (ROOT / "README.md").read_text()
    assert [figure for figure in tried if figure not in readme] == []
