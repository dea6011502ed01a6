"""Run measurements in new processes: one at a time, monitored, and killed if they use too much memory."""

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent.parent
POLL_S = 0.1
INTERRUPTED = 130  # exit status
GIB = 2**30
TAIL_LINES = 15
RETURN_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20)
}  # glibc: larger blocks go back to the system when they are freed
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "MemoryError")


@dataclass(frozen=True)
class Children:
    """Settings of the child processes.

    Attributes:
        script: the program that answers `--child SPEC` with JSON on its last line.
        threads: CPU threads per child.
        limit_gib: resident host memory above which a child is killed and counts as not fitting.
        path: folders in front of the child's import path.
        exact_memory: return freed tensors to the system at once, so that resident memory is in use; steps get slower.
    """

    script: Path
    threads: int
    limit_gib: float
    console: Console
    path: Sequence[Path] = (ROOT,)
    exact_memory: bool = False

    def run(self, spec: dict[str, Any], label: str, *, limit_s: float = math.inf) -> dict[str, Any]:
        """One of `{"result": ...}`, `{"does_not_fit": reason}`, `{"timed_out": reason}` and `{"failed": last lines}`.

        Args:
            limit_s: seconds after which the process is killed.
        """
        command = [sys.executable, str(self.script), "--child", json.dumps(spec)]
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            with subprocess.Popen(command, stdout=out, stderr=err, env=self._environment()) as process:
                try:
                    stopped = self._watch(process, label, limit_s)
                finally:
                    process.kill()
            return stopped or self._answer(process.returncode, _text(out), _text(err))

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
            **(RETURN_AT_ONCE if self.exact_memory else {}),
        }

    def _watch(self, process: subprocess.Popen[bytes], label: str, limit_s: float) -> dict[str, Any] | None:
        """Wait for the process to end; return the outcome if it had to be killed."""
        start = time.monotonic()
        with self.console.status(label) as status:
            while process.poll() is None:
                time.sleep(POLL_S)
                resident = _resident_gib(process.pid)
                seconds = time.monotonic() - start
                status.update(f"{label}  {seconds:.0f} s, {resident:.1f} GiB")
                if resident > self.limit_gib:
                    return {"does_not_fit": f"more than {self.limit_gib:.1f} GiB resident"}
                if seconds > limit_s:
                    return {"timed_out": f"more than {limit_s:.0f} s"}
        return None

    def _answer(self, code: int, out: str, err: str) -> dict[str, Any]:
        if code == -signal.SIGKILL:
            return {"does_not_fit": "killed by the system"}
        if code == 0:
            return {"result": json.loads(out.strip().splitlines()[-1])}
        tail = err.strip().splitlines()[-TAIL_LINES:]
        if any(sign in line for line in tail[-1:] for sign in OUT_OF_MEMORY):
            return {"does_not_fit": tail[-1]}
        return {"failed": tail or [f"return code {code}"]}


def answer(result: dict[str, Any]) -> None:
    """In a child: print its result, on a line of its own."""
    print("\n" + json.dumps(result))


def console() -> Console:
    """The terminal; a table in a file or a pipe is wide enough for its columns."""
    return Console(width=None if sys.stdout.isatty() else 200)


def dated(name: str, suffix: str) -> str:
    """`bench-2026-01-31-1530.json`: later results do not overwrite earlier ones."""
    return f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M}.{suffix}"


def default_limit_gib() -> float:
    return 0.85 * psutil.virtual_memory().total / GIB


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resident_gib(pid: int) -> float:
    try:
        return psutil.Process(pid).memory_info().rss / GIB
    except psutil.Error:  # it just ended
        return 0.0


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def add_child_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every program that starts children."""
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads; default: all cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def add_options(parser: argparse.ArgumentParser, name: str, warmup: str) -> None:
    """Add the options that all benchmarks have.

    Args:
        name: of the file of the results.
        warmup: description of the warm-up steps.
    """
    parser.add_argument("--steps", type=int, default=3, help="measured optimizer steps; default 3")
    parser.add_argument("--warmup", type=int, default=1, help=f"{warmup} before those; default 1")
    parser.add_argument(
        "--memory-limit",
        type=float,
        default=default_limit_gib(),
        metavar="GIB",
        help="host memory above which a run is killed and counts as not fitting; default: 85%% of the machine's",
    )
    parser.add_argument(
        "--exact-memory",
        action="store_true",
        help="on Linux, more reproducible peaks at the cost of slower steps",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs", dated(name, "json")),
        help="JSON file of the results; default: a file in outputs/, named by the time",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    add_child_options(parser)
