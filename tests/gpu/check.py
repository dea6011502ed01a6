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

from parts import WHOLE, Part, exit_status, run_program

SECONDS = 8 * 60
# The check or the plan of each part, and its time limit.
LIMITS = {
    "scores": 60,
    "sampling": 60,
    "steps": 60,
    "nf4": 90,
    "job": 120,
    "fp16": 90,
    "little_memory": 60,
    "syncs": 40,
}
PLAN_LIMIT = 75


def _plan(name: str, size: str, *, load_in_4bit: bool = False, **sizes: Any) -> dict[str, Any]:
    model = f"Qwen/Qwen2.5-{size}-Instruct"
    return {"check": f"plan {name}", "model": model, "load_in_4bit": load_in_4bit, "sizes": sizes}


PLANS = [
    _plan("1.5B NF4, one row", "1.5B", load_in_4bit=True, prompt=384, completion=256),
    _plan("0.5B bf16, one row", "0.5B", prompt=200, completion=128),
    _plan("7B NF4, one row", "7B", load_in_4bit=True, prompt=384, completion=256),
    _plan("1.5B bf16, chunks of 1024", "1.5B", prompt=384, completion=128, chunk_tokens=1024),
    _plan("0.5B bf16, one graph", "0.5B", prompt=200, completion=128, gradient_checkpointing=False),
]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    checks = [{"check": name} for name in LIMITS] + (PLANS[:1] if options.tiny else PLANS)
    if options.tiny:
        selected = [spec for spec in checks if options.only is None or spec["check"].startswith(tuple(options.only))]
        yield Part(WHOLE, {"checks": selected, "tiny": True}, 300)
        return
    for spec in checks:
        yield Part(spec["check"], {"checks": [spec], "tiny": False}, LIMITS.get(spec["check"], PLAN_LIMIT))


def run_checks(spec: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each check. A check that failed does not end the others, but their process, after the last one."""
    from checks import CHECKS, plan

    results, failed = {}, False
    for check in spec["checks"]:
        name, settings = check["check"], {key: value for key, value in check.items() if key != "check"}
        try:
            results[name] = CHECKS.get(name, plan)(spec["tiny"], **settings)
        except Exception as error:
            traceback.print_exc()
            results[name], failed = {"failed": f"{type(error).__name__}: {error}"}, True
    if failed:
        raise SystemExit(json.dumps(results))
    return results


def main() -> int:
    """Return the exit status: 1 if a part has no result, or there is no GPU."""
    script = Path(__file__).resolve()
    lines = run_program(script, __doc__, name="check", seconds=SECONDS, parts_of=parts, run=run_checks)
    return exit_status(lines)


if __name__ == "__main__":
    sys.exit(main())
