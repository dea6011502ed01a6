"""What is installed: the wheel, the wheel of the sdist, and the editable installation; each without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools import markdown
from tests.tools.lanes import THOROUGH
from tests.tools.paths import ROOT, TINY_DATA, TINY_MODEL, tracked_files
from tests.tools.waiting import PATIENCE

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SHORT = (
    "--max_steps 2 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_completion_length 24 "
    "--max_eval_prompts 8 --eval_samples 0 --eval_steps 2"
).split()
NAMES_OF_USERS = ("rewards", "recipes", "data", "config")


def build(project: Path, folder: Path, *targets: str) -> list[Path]:
    """The distributions of a project, built with the backend that is installed here, without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    for target in targets:
        command += ["--target", target]
    built = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return sorted(folder.glob("grpo_ext-*"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    (path,) = build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Callable[..., Path]:
    """`environment(wheel)`: the programs of a fresh environment with the package, and its dependencies from here."""

    def make(wheel: Path) -> Path:
        venv = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        install = [*PIP, "--python", str(venv / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
        installed = subprocess.run(install, capture_output=True, text=True)
        assert installed.returncode == 0, installed.stderr
        (site,) = venv.glob("lib/python*/site-packages")
        assert list(site.glob("grpo_ext-*.dist-info"))
        # Only now, so that pip does not find the package of the checkout there; .pth files in it are not followed.
        packages = "\n".join(path for path in sys.path if path.endswith("-packages"))
        (site / "dependencies.pth").write_text(f"{packages}\n")
        return venv / "bin"

    return make


@pytest.fixture(scope="module")
def installed(wheel, environment) -> Path:
    return environment(wheel)


@pytest.fixture(scope="module")
def elsewhere(installed, tmp_path_factory):
    """`elsewhere("grpo-ext", "--help")`: what a program of the environment prints, in a folder whose modules have the
    names that a user's own may have, and stop every program that imports them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in NAMES_OF_USERS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the {name}.py of the user')\n")
    return lambda program, *arguments: run(installed / program, *arguments, cwd=folder)


def run(program: Path, *arguments: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [str(program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def contents(path: Path) -> dict[str, bytes]:
    """Name and bytes of every file of the package in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_everything_is_in_it(wheel):
    """All of three folders of the checkout, under one name: templates, scripts of the sandbox, presets, and the
    embedded model with its problems. Nothing else, and no other top-level module."""
    tracked = {name for name in tracked_files("-co", "--exclude-standard") if (ROOT / name).is_file()}
    ours = {name for name in tracked if name.startswith("grpo_ext/")}
    ours |= {f"grpo_ext/{name}" for name in tracked if name.startswith(("rewards/", "recipes/"))}
    assert set(contents(wheel)) == ours
    assert {"grpo_ext/py.typed", "grpo_ext/recipes/tiny_math/model/model.safetensors"} <= ours


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    """hatchling leaves out one of two paths to a folder: of a linked folder, the sdist held nothing."""
    (sdist,) = build(ROOT, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (again,) = build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel", "wheel")
    assert contents(again) == contents(wheel)


def test_an_editable_installation_has_the_same_names(environment, tmp_path):
    """With the checkout on its path, `import rewards` found our folder, or hid a package that a user had installed."""
    (wheel,) = build(ROOT, tmp_path, "wheel:editable")  # as `pip install --editable` builds it
    programs = environment(wheel)
    look = f"""if True:
        import importlib.util
        from grpo_ext.rewards import math_answer_reward
        assert not [name for name in {NAMES_OF_USERS!r} if importlib.util.find_spec(name)]
        print(importlib.util.find_spec("grpo_ext.recipes.math").origin, math_answer_reward(["#### 3"], answer=["3"]))
    """
    file, score = run(programs / "python", "-c", look, cwd=tmp_path).split()
    assert (file, score) == (str(ROOT / "grpo_ext" / "recipes" / "math.py"), "[1.0]")


def test_names_of_users_disturb_nothing(elsewhere):
    """Guards against a `rewards.py` next to the user's script that hides our package, so that imports of it fail."""
    look = """if True:
        import grpo_ext
        from grpo_ext.rewards import math_answer_reward, isolated
        reward = isolated(math_answer_reward)
        print(grpo_ext.__file__, reward(completions=["#### 3", "#### 4"], answer=["3", "3"]))
    """
    file, scores = elsewhere("python", "-c", look).split(maxsplit=1)
    assert "site-packages" in file
    assert str(ROOT) not in file
    assert scores == "[1.0, 0.0]\n"


@pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true", reason="bwrap is missing: apt install bubblewrap"
)
def test_programs_elsewhere(elsewhere):
    """A sandbox that starts its scripts from the checkout starts nothing here."""
    look = """if True:
        from grpo_ext.rewards import program_reward
        right, wrong = (f"```python\\ndef f(x):\\n    return x + {n}\\n```" for n in (1, 2))
        calls = {"entry_point": ["f"] * 2, "inputs": [[[1], [2]]] * 2, "outputs": [[2, 3]] * 2}
        print(program_reward(prompts=["", ""], completions=[right, wrong], **calls))
    """
    assert elsewhere("python", "-c", look) == "[1.0, 0.0]\n"


def test_training_elsewhere(elsewhere, installed, tmp_path):
    """The embedded run, in a folder that also holds a `math.py`, which every module of Python would import there."""
    for name in (*NAMES_OF_USERS, "math", "random"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name}.py of the user')\n")
    output = run(installed / "grpo-ext", "train", "math", *SHORT, "--output_dir", "run", cwd=tmp_path)
    assert "held-out pass@1: " in output.splitlines()[-1]
    assert str(ROOT) not in output
    assert {"adapter_model.safetensors", "report.html"} <= {path.name for path in (tmp_path / "run").iterdir()}
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["command"].startswith("grpo-ext train math --max_steps 2")

    elsewhere("grpo-ext", "report", str(tmp_path / "run"))
    assert "50 rows" in elsewhere("grpo-ext", "audit", "--data", str(TINY_DATA / "test.jsonl"))


@pytest.mark.skipif(not THOROUGH, reason="run with THOROUGH=1: others launch recipes, and train with this wheel")
def test_a_launched_module_elsewhere(installed, tmp_path):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "-m", "grpo_ext.recipes.math"]
    output = run(installed / "python", *launcher, *SHORT, "--dry_run", "--output_dir", "run", cwd=tmp_path)
    assert "dry run: all checks passed" in output


def test_the_example_of_the_readme_elsewhere(elsewhere, tmp_path):
    """As printed, with the embedded model and its problems in place of those of the Hub; then the new lines of the
    diff from stock TRL."""
    blocks = markdown.blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    (code,) = (block.text for block in blocks if block.language == "python")
    (diff,) = (block.text for block in blocks if block.language == "diff")
    replaced = {
        '"Qwen/Qwen2.5-0.5B"': repr(str(TINY_MODEL)),
        'load_dataset("openai/gsm8k", "main", split="train")': f'load_dataset({str(TINY_DATA)!r}, split="train")',
        '"gsm8k-lora", max_steps=500': f"{str(tmp_path)!r}, max_steps=1, max_completion_length=8",
    }
    for printed, here in replaced.items():
        assert printed in code
        code = code.replace(printed, here)
    code += "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))
    elsewhere("python", "-c", f"{code}\nassert (args.loss_type, args.beta) == ('dapo', 0.0)\n")
    assert (tmp_path / "metrics.jsonl").exists()
