"""The wheel, installed without a checkout: packages with their data files, and the commands."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built with the backend that is installed here, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("grpo_ext-*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """`elsewhere("grpo-ext", "--help")`: what a program of a fresh environment prints, from another folder. The
    environment has the wheel, and its dependencies from here."""
    venv, cwd = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--no-deps"]
    installed = subprocess.run([*install, "--no-index", str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    (site,) = venv.glob("lib/python*/site-packages")
    assert list(site.glob("grpo_ext-*.dist-info"))
    # Only now, so that pip does not find the package of the checkout there; .pth files in it are not followed.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}

    def run(program: str, *arguments: str) -> str:
        command = [str(venv / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def files_of(package: str) -> set[str]:
    """All that lies in a package of the checkout, but for what Python made."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_everything_is_in_it(wheel):
    """The templates of the report, the scripts that run inside the sandbox, the marks that the packages are typed; no
    tests, recipes or weights."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of("grpo_ext") | files_of("rewards")
    assert {"grpo_ext/report/template/page.html", "rewards/code/guest/launch.py", "rewards/py.typed"} <= names


@pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true", reason="bwrap is missing: apt install bubblewrap"
)
def test_rewards_elsewhere(elsewhere):
    """A sandbox that starts its scripts from the checkout starts nothing here."""
    look = """if True:
        import json
        import grpo_ext.rewards as rewards
        right, wrong = (f"```python\\ndef f(x):\\n    return x + {n}\\n```" for n in (1, 2))
        calls = {"entry_point": ["f"] * 2, "inputs": [[[1], [2]]] * 2, "outputs": [[2, 3]] * 2}
        print(json.dumps([
            rewards.__file__,
            rewards.math_answer_reward(completions=["#### 3", "#### 4"], answer=["3", "3"]),
            rewards.program_reward(prompts=["", ""], completions=[right, wrong], **calls),
        ]))
    """
    file, answers, programs = json.loads(elsewhere("python", "-c", look))
    assert "site-packages" in file
    assert str(ROOT) not in file
    assert (answers, programs) == ([1.0, 0.0], [1.0, 0.0])


def test_commands_elsewhere(elsewhere, build, tiny_model, tmp_path):
    """Modules that find a file by the checkout, or import from it, work there and nowhere else."""
    assert "audit" in elsewhere("grpo-ext", "--help")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(8)))
    assert "8 rows" in elsewhere("grpo-ext", "audit", "--data", str(problems))

    trainer = build(tiny_model)
    trainer.train()
    report = Path(trainer.args.output_dir, "report.html")
    assert not report.exists()
    assert str(report) in elsewhere("grpo-ext", "report", trainer.args.output_dir).replace("\n", "")
    assert "<html" in report.read_text(encoding="utf-8")
