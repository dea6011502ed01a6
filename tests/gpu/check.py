"""Is what grpo-ext computes on this GPU right, and does it use the memory that was planned? About 8 minutes.

    bash tests/gpu/check.sh                             # everything
    bash tests/gpu/check.sh --only scores,plan          # some parts

Every part is a process of its own under a time limit, so that a hang or a crash ends that part only. With `--tiny`,
models are tiny, a CPU will do, and all parts share one process.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts import MACHINE, Part, add_options, answer, is_selected, run_parts
from report import failures

SECONDS = 8 * 60
# The check or the plan of each part, and its time limit.
LIMITS = {
    "scores": 60,
    "sampling": 60,
    "steps": 60,
    "nf4": 90,
    "job": 120,
    "fp16": 60,
    "little_memory": 60,
    "syncs": 40,
}
PLANS = ("0.5B bf16, one row", "1.5B NF4, one row", "7B NF4, one row", "1.5B bf16, chunks of 1024")
PLANS += ("0.5B bf16, one graph",)
PLAN_LIMIT = 75
TINY_PLANS = PLANS[1:2]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    yield MACHINE
    checks = [{"check": name} for name in LIMITS]
    plans = [{"check": "plan", "name": name} for name in (TINY_PLANS if options.tiny else PLANS)]
    if options.tiny:
        yield Part("all", {"checks": [spec for spec in checks + plans if _selected(spec, options)], "tiny": True}, 300)
        return
    for spec in checks + plans:
        limit = LIMITS.get(spec["check"], PLAN_LIMIT)
        yield Part(_name(spec), {"checks": [spec], "tiny": False}, limit)


def _name(spec: dict[str, Any]) -> str:
    return " ".join(spec.values())


def _selected(spec: dict[str, Any], options: argparse.Namespace) -> bool:
    return options.only is None or _name(spec).startswith(tuple(options.only))


def run_checks(spec: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each check. A check that failed does not end the others, but their process, after the last one."""
    from checks import CHECKS, plan

    results, failed = {}, False
    for check in spec["checks"]:
        name = _name(check)
        try:
            if check["check"] == "plan":
                results[name] = plan(spec["tiny"], name=check["name"])
            else:
                results[name] = CHECKS[name](spec["tiny"])
        except Exception as error:
            traceback.print_exc()
            results[name], failed = {"failed": f"{type(error).__name__}: {error}"}, True
    if failed:
        raise SystemExit(json.dumps(results))
    return results


def main() -> int:
    """Return the exit status: 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "check", SECONDS)
    options = parser.parse_args()
    if options.child:
        answer(json.loads(options.child), run_checks)
        return 0
    selected = [part for part in parts(options) if part.name == "all" or is_selected(part, options.only)]
    return int(failures(run_parts(Path(__file__).resolve(), selected, options)) > 0)


if __name__ == "__main__":
    sys.exit(main())
