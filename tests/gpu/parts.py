"""Run the parts of the kit: each in a process of its own, under a time limit, with its result written at once.

{"part": "scores", "took_s": 9.1, "result": {...}}
{"part": "T1 stock", "took_s": 90.0, "timed_out": "more than 90 s"}
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from children import ROOT, Children, default_limit_gib, default_threads
from report import outcome
from rich.console import Console

MIN_LEFT_S = 15  # a part is not started with less time than this


@dataclass(frozen=True)
class Part:
    """One measurement or check.

    Attributes:
        spec: what its process does; JSON.
        limit_s: seconds after which it is killed.
        about: further keys of its line.
    """

    name: str
    spec: dict[str, Any]
    limit_s: float
    about: dict[str, Any] = field(default_factory=dict)


def run_parts(script: Path, parts: Iterable[Part], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the parts in order and return their lines, of which each is in the file as soon as its part has ended."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    children = Children(script, options.threads, default_limit_gib(), console, path=(ROOT, *_path()))
    done = _finished(options.skip_done)
    lines: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with options.out.open("a", encoding="utf-8") as file:
        for part in parts:
            if part.name in done:
                continue
            began = time.monotonic()
            left = options.seconds - (began - start)
            if left < MIN_LEFT_S:
                ending = {"not_reached": f"less than {MIN_LEFT_S} s of {options.seconds:.0f} left"}
            else:
                ending = children.run(part.spec, part.name, limit_s=min(part.limit_s, left))
            line = {"part": part.name, **part.about, "took_s": round(time.monotonic() - began, 1), **ending}
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
            console.print(f"{part.name}: {_ending(line)}", markup=False, highlight=False)
            if part.name == "machine" and not options.tiny and not _has_gpu(line):
                console.print("the other parts need a GPU; --tiny tries them out on a CPU")
                break
    console.print(f"all numbers: {options.out}")
    return lines


MACHINE = Part("machine", {"machine": True}, limit_s=60)  # the first part of every run


def answer(spec: dict[str, Any], run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process of a part: print its result, the description of the machine or that of `run`."""
    if spec == MACHINE.spec:
        from machine import describe

        result = describe()
    else:
        result = run(spec)
    print("\n" + json.dumps(result))


def _has_gpu(line: dict[str, Any]) -> bool:
    """Whether the description of the machine names a card."""
    return isinstance(line.get("result", {}).get("gpu"), dict)


def _ending(line: dict[str, Any]) -> str:
    if "not_reached" in line:
        return f"not reached: {line['not_reached']}"
    if "result" in line and "seconds" not in line["result"]:
        return json.dumps(line["result"])
    return outcome(line)


def _finished(file: Path | None) -> set[str]:
    """The parts that have a result in this file."""
    if file is None:
        return set()
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["part"] for line in lines if "result" in line}


def _path() -> list[str]:
    """Folders that the children import from, in addition to the checkout."""
    return [str(ROOT / "tests" / "benchmarks"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def add_options(parser: argparse.ArgumentParser, name: str, seconds: int) -> None:
    """Add the options of both programs.

    Args:
        name: of the program, for the name of its file.
        seconds: default of `--seconds`.
    """
    now = datetime.datetime.now(datetime.UTC)
    folder = Path(os.environ.get("OUT") or "outputs/gpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=folder / f"{name}-{now:%Y-%m-%d-%H%M}.jsonl",
        help="file to which results are appended; default: a file named by the time, in $OUT or outputs/gpu",
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="for all parts; default: %(default)s")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts whose names begin with one of these")
    parser.add_argument("--skip-done", type=Path, metavar="FILE", help="skip parts that have a result in this file")
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads; default: all cores")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU if there is no GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def is_selected(part: Part, only: list[str] | None) -> bool:
    """Whether `--only` leaves this part in; the description of the machine always is."""
    return only is None or part.name == "machine" or part.name.startswith(tuple(only))
