"""The project's frame: the top level, what make installs, and the order in which packages import each other."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.tools.paths import ROOT

TOP_LEVEL = set(
    "grpo_ext rewards recipes tests accelerate_configs pyproject.toml "
    "README.md LICENSE CHANGELOG.md CONTRIBUTING.md Makefile constraints.txt .ci .github .gitignore".split()
)


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def test_the_top_level_holds_what_was_agreed():
    assert {path.partition("/")[0] for path in tracked_files()} == TOP_LEVEL


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


def test_nothing_is_installed_twice(tmp_path):
    """make has nothing to install after an installation that is newer than the package files, and installs again
    after one of them changed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    (tmp_path / ".venv").mkdir()
    for name, seconds in ((".installed", 2_000_000), (".tools", 3_000_000)):
        (tmp_path / ".venv" / name).touch()
        os.utime(tmp_path / ".venv" / name, (seconds, seconds))

    def installs():
        command = ["make", "-n", "test", f"PYTHON={sys.executable}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.count("pip install")

    assert installs() == 0
    os.utime(tmp_path / "constraints.txt", (4_000_000, 4_000_000))
    assert installs() == 2


def test_packages_import_downwards_only():
    """The contracts of [tool.importlinter] in pyproject.toml: layers of grpo_ext, and what the rewards do without."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
