"""Start programs: a command as a user would, or a test script in two processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

BIN = Path(sys.executable).parent
LAUNCH = [str(BIN / "accelerate"), "launch"]


def launch(command: list[str], cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Run a command as a user would; return its exit code and its output, both streams as in a terminal."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **environment}
    env.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


def in_two_processes(script: str, folder: Path, options: list[str]) -> None:
    """Run a test script in two processes on the CPU, with the folder as its argument and their output in `folder/log`.

    Args:
        options: options of `accelerate launch`, one entry per machine; all are launched at the same time.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    commands = [[*LAUNCH, *of_one.split(), script, folder] for of_one in options]
    with (folder / "log").open("w+") as log:
        shared = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
        launched = [subprocess.Popen(command, **shared) for command in commands]
        try:
            for launcher in launched:
                launcher.wait(timeout=PATIENCE)
        finally:
            for launcher in launched:
                launcher.terminate()  # not kill, which would leave its processes behind
                launcher.wait()
        log.seek(0)
        assert not any(launcher.returncode for launcher in launched), log.read()
