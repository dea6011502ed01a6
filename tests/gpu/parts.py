"""Run the parts of the kit: each in a process of its own, under a time limit, with its result written at once.

{"part": "scores", "took_s": 9.1, "result": {...}}
{"part": "T1 stock", "took_s": 90.0, "timed_out": "more than 90 s"}
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from children import ROOT, Children, add_child_options, answer, console, dated, default_limit_gib
from report import outcome

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


MACHINE = Part("machine", {"machine": True}, limit_s=60)  # the first part of every run
WHOLE = "all"  # the name of a part that does its own selection


def run_program(
    script: Path,
    about: str | None,
    *,
    name: str,
    seconds: int,
    parts_of: Callable[[argparse.Namespace], Iterable[Part]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run a program of the kit and return the lines of its parts. In the process of a part, print its result and exit.

    Args:
        script: the program, which is started again for each part.
        about: description for `--help`.
        name: name of the program, for that of its file.
        seconds: default of `--seconds`.
        parts_of: the parts, from the options.
        run: the result of a part, from its `spec`.

    Raises:
        SystemExit: a part has ended, or the machine has no GPU.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(parser, name, seconds)
    options = parser.parse_args()
    if options.child:
        spec = json.loads(options.child)
        answer(_describe_machine() if spec == MACHINE.spec else run(spec))
        sys.exit()
    selected = [part for part in (MACHINE, *parts_of(options)) if _is_selected(part, options.only)]
    return run_parts(script, selected, options)


def exit_status(lines: Iterable[dict[str, Any]], accepted: Collection[str] = ()) -> int:
    """1 if a part has neither a result nor one of the accepted outcomes, such as `not_reached`."""
    return int(any(line.keys().isdisjoint(("result", *accepted)) for line in lines))


def run_parts(script: Path, parts: Iterable[Part], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the parts in order, and return their lines after those of `--skip-done`. Each line is in the file as soon as
    its part has ended.

    Raises:
        SystemExit: the machine has no GPU, and the models are not tiny.
    """
    terminal = console()
    children = Children(script, options.threads, default_limit_gib(), terminal, path=(ROOT, *_path()))
    done = _finished(options.skip_done)
    lines = list(done.values())
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
            terminal.print(f"{part.name}: {_ending(line)}", markup=False, highlight=False)
            if part is MACHINE and not options.tiny and not _has_gpu(line):
                sys.exit("The other parts need a GPU. With --tiny, a CPU will do.")
    terminal.print(f"all numbers: {options.out}")
    return lines


def _describe_machine() -> dict[str, Any]:
    from machine import describe

    return describe()


def _has_gpu(line: dict[str, Any]) -> bool:
    """Whether the description of the machine names a card."""
    return isinstance(line.get("result", {}).get("gpu"), dict)


def _ending(line: dict[str, Any]) -> str:
    if "result" in line and "seconds" not in line["result"]:
        return json.dumps(line["result"])
    return outcome(line)


def _finished(file: Path | None) -> dict[str, dict[str, Any]]:
    """The lines of this file that have a result, by part. The machine is described again in every run."""
    if file is None:
        return {}
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["part"]: line for line in lines if "result" in line and line["part"] != MACHINE.name}


def _path() -> list[str]:
    """Folders that the children import from, in addition to the checkout."""
    return [str(ROOT / "tests" / "benchmarks"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _add_options(parser: argparse.ArgumentParser, name: str, seconds: int) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "outputs/gpu", dated(name, "jsonl")),
        help="file to which results are appended; default: a file named by the time, in $OUT or outputs/gpu",
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="for all parts; default: %(default)s")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts whose names begin with one of these")
    parser.add_argument(
        "--skip-done",
        type=Path,
        metavar="FILE",
        help="skip parts that have a result in this file, and show that result",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU if there is no GPU")
    add_child_options(parser)


def _is_selected(part: Part, only: list[str] | None) -> bool:
    """Whether `--only` leaves this part in; the description of the machine always is."""
    return only is None or part.name in (MACHINE.name, WHOLE) or part.name.startswith(tuple(only))
