"""What importing the package and starting its commands loads, and the lazy names of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_ext
from grpo_ext.algorithms import algorithm, overlong_punishment
from grpo_ext.cli import COMMANDS
from grpo_ext.config import TRL_DEFAULTS, GRPOExtConfig
from grpo_ext.evaluation.complete import evaluate
from grpo_ext.rollout.dialogue import Dialogue, TextEnv, dialogue_reward
from grpo_ext.trainer import GRPOExtTrainer
from tests.tools.paths import ROOT

SLOW = {"torch", "trl", "transformers", "bitsandbytes", "matplotlib", "loky", "peft", "accelerate", "datasets"}
LAZY = {
    "TRL_DEFAULTS": TRL_DEFAULTS,
    "Dialogue": Dialogue,
    "GRPOExtConfig": GRPOExtConfig,
    "GRPOExtTrainer": GRPOExtTrainer,
    "TextEnv": TextEnv,
    "algorithm": algorithm,
    "dialogue_reward": dialogue_reward,
    "evaluate": evaluate,
    "overlong_punishment": overlong_punishment,
}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def loaded_by(code: str) -> set[str]:
    """The slow packages that a fresh interpreter has loaded after running this code, which may end in SystemExit."""
    script = f"""if True:
        import sys
        try:
            exec({code!r}, {{}})
        except SystemExit as exit:
            assert not exit.code, exit.code
        print(sorted({SLOW!r} & set(sys.modules)), file=sys.stderr)
    """
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()  # there are no other messages
    return set(json.loads(line.replace("'", '"')))


def test_the_package_loads_nothing_until_a_name_is_used():
    """Otherwise a notebook, shell completion and `--help` would wait for torch and TRL."""
    assert loaded_by("import grpo_ext; dir(grpo_ext); grpo_ext.__version__") == set()


def test_help_is_quick():
    """The help of every command is shown in one interpreter."""
    commands = [["--help"], *([command, "--help"] for command in COMMANDS)]
    code = f"""if True:
        from grpo_ext.cli import main
        for arguments in {commands!r}:
            try:
                main(arguments)
            except SystemExit as exit:
                assert not exit.code, arguments
    """
    assert loaded_by(code) == set()


def test_the_report_of_a_run_needs_no_torch(tmp_path):
    """It only reads files, so it may run on a machine without the means to train."""
    rows = [{"step": step, "reward": step / 2, "heldout/pass@1": 0.5} for step in (0, 1)]
    heldout = [{"step": step, "right": [0, step], "pass_at": {}, "kinds": {}, "answers": []} for step in (0, 1)]
    for name, lines in (("metrics", rows), ("heldout", heldout), ("completions", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = f"from grpo_ext.cli import main; main(['report', {str(tmp_path)!r}])"
    assert loaded_by(code) == {"matplotlib"}
    assert "held-out problems" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "curves.png").exists()
    assert (
        loaded_by(
            f"from grpo_ext.cli import main; main(['report', *[{str(tmp_path)!r}] * 2, '--output', "
            f"{str(tmp_path / 'two.html')!r}])"
        )
        == set()
    )


@pytest.mark.parametrize("module", ["grpo_ext", "grpo_ext.cli"])
def test_the_command_as_a_module(module):
    done = python("-m", module, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: grpo-ext [-h] COMMAND")
    done = python("-m", module, "report")
    assert done.returncode == 2
    assert "usage: grpo-ext report [-h]" in done.stderr


def test_imports_of_a_command_print_nothing(tmp_path):
    """When PEFT imports bitsandbytes, it asks for a package that is not needed."""
    done = python("-m", "grpo_ext", "push", str(tmp_path), "someone/math")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("grpo-ext: ")


def test_lazy_names():
    assert set(grpo_ext.__all__) == set(LAZY)
    assert {name: getattr(grpo_ext, name) for name in LAZY} == LAZY
    assert {*LAZY, "__version__"} <= set(dir(grpo_ext))
    with pytest.raises(AttributeError, match="module 'grpo_ext' has no attribute 'GRPOTrainer'"):
        _ = grpo_ext.GRPOTrainer
    with pytest.raises(ImportError, match="cannot import name 'GRPOTrainer'"):
        from grpo_ext import GRPOTrainer  # noqa: F401


def test_star_import():
    names: dict[str, object] = {}
    exec("from grpo_ext import *", names)
    assert {name: names[name] for name in LAZY} == LAZY
