"""How fast are steps on this GPU? Whole GRPO steps of grpo-ext, of stock TRL, and with single mechanisms switched off.

    source tests/gpu/setup.sh && python3 tests/gpu/bench.py
    python3 tests/gpu/bench.py --only T1,GSM8K --skip-done FILE      # continue in a second session

Models have real shapes and random weights, in bfloat16 or NF4 with LoRA r=16 on every linear layer; `shapes.py` has the
workloads. Each variant is a process with a warm-up step and a measured one. The most informative variants come first,
and what 9 minutes do not reach is listed as not reached. With `--tiny`, models are tiny and a CPU will do.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts import Part, console, exit_status, run_program
from report import runs_table
from shapes import CASES, Case, shape
from workloads import Workload

SECONDS = 9 * 60
TINY_VARIANTS = ("all mechanisms off",)  # the checks run stock TRL, and grpo_ext with all of them


def variants(workload: Workload) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Side, name, fields of the trainer's config and further keys of the specification, most informative first.

    Micro-batches are one group. "As in recipes" has `chunk_tokens="auto"`. The variants without a mechanism have an
    autograd graph for one row at a time, and are compared with the variant of that name.
    """
    group = {"per_device_train_batch_size": workload.generations}
    checkpointing = {**group, "gradient_checkpointing": True}
    one_row = {**group, "chunk_tokens": workload.longest_row}
    off = ("CUDA graph", "stacked LoRA", "grouped attention")
    continuous = {**checkpointing, "use_transformers_continuous_batching": True}
    return [
        ("ours", "as in recipes", {**checkpointing, "chunk_tokens": "auto"}, {}),
        ("stock", "TRL's defaults", checkpointing, {}),
        ("ours", "one row at a time", one_row, {}),
        ("ours", "four rows per chunk", {**group, "chunk_tokens": 4 * workload.longest_row}, {}),
        # Its sampler takes no logits processor that would end completions: they have the maximum length.
        ("stock", "continuous batching", continuous, {"free_lengths": True}),
        *(("ours", f"no {name}", one_row, {"switched_off": [name]}) for name in off),
        ("ours", "all mechanisms off", one_row, {"switched_off": off}),
        ("ours", "prompts not shared", {**checkpointing, "share_prompt": False}, {}),
        ("ours", "one graph", {**group, "chunk_tokens": None}, {}),
        ("stock", "no checkpointing", group, {}),
    ]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """The first variant of every workload, then the second one, and so on."""
    cases = [CASES["T1"]] if options.tiny else list(CASES.values())
    by_variant = zip(*(variants(case.workload) for case in cases), strict=True)
    for same in by_variant:
        for case, (side, name, settings, further) in zip(cases, same, strict=True):
            if not options.tiny or name in TINY_VARIANTS:
                yield _part(case, side, name, settings, further, is_tiny=options.tiny)


def _part(
    case: Case, side: str, name: str, settings: dict[str, Any], further: dict[str, Any], *, is_tiny: bool
) -> Part:
    spec = case.spec(is_tiny=is_tiny) | {"side": side, "settings": settings} | further
    if settings.get("chunk_tokens") == "auto":  # measured in the first step, which should have the shape of the others
        spec["warmup_workload"] = spec["workload"]
    about = {"workload": case.workload.name, "title": case.workload.title, "side": side, "variant": name, "spec": spec}
    return Part(f"{case.workload.name} {side}, {name}", spec, case.seconds, about)


def measure_variant(spec: dict[str, Any]) -> dict[str, Any]:
    from grpo_side import measure

    return measure(spec | {"shape": shape(spec["model"], is_tiny=spec["is_tiny"])})


def main() -> int:
    """Return the exit status: 1 if a part failed, or there is no GPU."""
    script = Path(__file__).resolve()
    lines = run_program(script, __doc__, name="bench", seconds=SECONDS, parts_of=parts, run=measure_variant)
    console().print(runs_table([line for line in lines if "workload" in line]))
    return exit_status(lines, accepted=("not_reached", "timed_out", "does_not_fit"))


if __name__ == "__main__":
    sys.exit(main())
