"""The structure of the project: the top level, what make installs, and the order in which packages are imported."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools.paths import ROOT, tracked_files

TOP_LEVEL = set(
    "grpo_ext rewards recipes tests accelerate_configs pyproject.toml "
    "README.md LICENSE CHANGELOG.md CONTRIBUTING.md Makefile constraints.txt .ci .github .gitignore".split()
)


def test_the_top_level_holds_what_was_agreed():
    assert {path.partition("/")[0] for path in tracked_files()} == TOP_LEVEL


def dependencies() -> list[Requirement]:
    """What an installation of the package and of its extras for users brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    return [Requirement(line) for line in project["dependencies"] + extras]


def names_of(distributions) -> list[str]:
    return sorted(canonicalize_name(name) for name in distributions)


def test_a_package_is_a_dependency_if_it_is_imported():
    """One that only another dependency brings is missing after that one's next release."""
    modules = set()
    for path in tracked_files():
        if path.endswith(".py") and path.startswith(("grpo_ext/", "rewards/", "recipes/")):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules.add(node.module)
    distributions = packages_distributions()
    third_party = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"grpo_ext"}
    assert names_of(requirement.name for requirement in dependencies()) == names_of(
        distributions.get(module, [module])[0]
        for module in third_party  # that of an extra may not be installed
    )


def test_every_dependency_has_a_purpose_and_tested_versions():
    """CONTRIBUTING.md has the purpose. `make oldest` installs the lowest versions, `make` those of constraints.txt."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w-]+)` \| \S", section, re.MULTILINE)
    assert names_of(listed) == names_of(requirement.name for requirement in dependencies())
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    for requirement in dependencies():
        assert any(bound.operator == ">=" for bound in requirement.specifier), requirement
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_accelerate_configs_say_when_to_use_them():
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert path.read_text().startswith("# For "), path
        assert yaml.safe_load(path.read_text())["num_machines"] == 1


def test_an_old_python_gets_one_line(tmp_path):
    """With a Python before 3.11, `make` says so before it installs anything."""
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
    assert said == ["grpo-ext needs Python 3.11 or newer; this is 3.9.1. Try: make PYTHON=python3.11"]


def test_nothing_is_installed_twice(tmp_path):
    """make installs nothing if the installation is newer than the package files, and installs again if one of them
    has changed."""
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
    """The contracts of [tool.importlinter] in pyproject.toml: layers of grpo_ext, and imports forbidden to rewards."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
