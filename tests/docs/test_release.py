"""A release: the version, the changelog, the workflows, and `make release` with a repository of its own."""

import re
import subprocess
from datetime import date
from pathlib import Path

import pytest
import yaml

from grpo_ext import __version__
from tests.tools.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A checkout that is ready for the release of 1.2.3, with a remote `origin`."""
    checkout = tmp_path / "checkout"
    (checkout / "grpo_ext").mkdir(parents=True)
    (checkout / "Makefile").write_text((ROOT / "Makefile").read_text())
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n")
    (checkout / "grpo_ext" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    for command in (
        "git init --quiet --bare ../origin",
        "git init --quiet",
        "git config user.name tests",
        "git config user.email tests@example.com",
        "git remote add origin ../origin",
        "git add .",
        "git commit --quiet -m first",
    ):
        done = run(*command.split(), cwd=checkout)
        assert done.returncode == 0, done.stderr
    return checkout


def test_release_pushes_the_tag_of_this_commit(repository):
    done = run("make", "release", "VERSION=1.2.3", cwd=repository)
    assert done.returncode == 0, done.stderr
    (head,) = run("git", "rev-parse", "HEAD", cwd=repository).stdout.split()
    assert run("git", "rev-parse", "v1.2.3^{commit}", cwd=repository.parent / "origin").stdout.split() == [head]


@pytest.mark.parametrize(
    ("version", "file", "text", "reason"),
    [
        ("", "CHANGELOG.md", None, "Which version?"),
        ("1.2.4", "CHANGELOG.md", None, "is not 1.2.4"),
        ("1.2.3", "CHANGELOG.md", "## [1.2.3]\n", "no section"),
        ("1.2.3", "CHANGELOG.md", "## [1x2.3] - 2026-01-31\n", "no section"),
        ("1.2.3", "grpo_ext/__init__.py", '__version__ = "1.2.3"\n\n', "not committed"),
    ],
)
def test_release_stops_before_the_tag(repository, version, file, text, reason):
    """Each of these would publish something that nobody meant to release."""
    if text is not None:
        (repository / file).write_text(text)
    done = run("make", "release", f"VERSION={version}", cwd=repository)
    assert done.returncode != 0
    assert reason in done.stdout
    assert run("git", "tag", cwd=repository).stdout == ""


def test_the_changelog_keeps_its_form():
    """https://keepachangelog.com: releases in the order of their dates, newest first, with known sections."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(releases), headings
    assert releases[0][1] == __version__
    dates = [date.fromisoformat(release[2]) for release in releases]
    assert dates == sorted(dates, reverse=True)
    sections = set(re.findall(r"^### (.*)", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_exists(path):
    """Their targets of make are there, every job has a machine and steps, and every action has a version."""
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert set(re.findall(r"\bmake ([\w-]+)", "\n".join(step.get("run", "") for step in job["steps"]))) <= targets
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1")), step
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])


def test_workflows_test_the_commands_and_pythons_that_the_project_names():
    (job,) = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if step.get("run", "").startswith("make")] == [
        "make check",
        "make test",
    ]
    classifiers = (ROOT / "pyproject.toml").read_text()
    for version in job["strategy"]["matrix"]["python-version"]:
        assert f"Programming Language :: Python :: {version}" in classifiers


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_valid(path):
    """GitHub shows no form, and no error, if one of these is missing."""
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
