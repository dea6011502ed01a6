"""The Dockerfile: what it copies is there and is enough to build the wheel, and the container runs as a user."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.tools.paths import ROOT


def instructions() -> list[tuple[str, str]]:
    """`[("FROM", "python:3.11-slim-bookworm AS build"), ("WORKDIR", "/src"), ...]`, with continued lines joined."""
    lines = (ROOT / "accelerate_configs" / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n\s*", "", text).splitlines()]


def test_the_container_runs_the_command_as_a_user():
    """`FROM` starts a stage: these must hold after the last one. A root user would write root's files to /work, and
    bubblewrap as root needs privileges that no container should have."""
    last = [name for name, _ in instructions()].index("FROM", 1)
    final = instructions()[last:]
    assert [value for name, value in final if name == "USER"][-1] not in ("root", "0")
    assert ("ENTRYPOINT", '["grpo-ext"]') in final
    installed = " ".join(value for name, value in final if name == "RUN").split()
    assert {"bubblewrap", "libseccomp2"} <= set(installed)


@pytest.mark.slow  # builds the wheel
def test_its_build_context_builds_the_wheel(tmp_path):
    """A file that the build needs and `COPY` leaves out is seen only by those who build the image."""
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    for arguments in (value.split() for name, value in instructions() if name == "COPY"):
        if arguments[0].startswith("--from="):
            continue
        *sources, target = arguments
        for source in sources:
            assert (ROOT / source).exists(), source
            if target.startswith("/"):
                continue
            (context / target).mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, context / target)
    command = f"{sys.executable} -m pip --disable-pip-version-check wheel --no-deps --no-index --no-build-isolation"
    built = subprocess.run(
        [*command.split(), "--wheel-dir", wheels, context], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("grpo_ext-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grpo_ext/recipes/math.py", "grpo_ext/recipes/tiny_math/model/model.safetensors"} <= names
    assert "grpo_ext/rewards/code/guest/launch.py" in names
