"""How fast are steps on this GPU? Whole GRPO steps of grpo-ext, of stock TRL, and with single mechanisms switched off.

    source tests/gpu/setup.sh && python3 tests/gpu/bench.py
    python3 tests/gpu/bench.py --only T1,GSM8K --skip-done FILE      # a second session goes on

Models have real shapes and random weights, in bfloat16 or NF4 with LoRA r=16 on every linear layer; `shapes.py` has the
workloads. Each variant is a process with a warm-up step and a measured one. The most informative variants come first,
and what 9 minutes do not reach is listed as not reached. With `--tiny`, models are tiny and a CPU will do.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts import MACHINE, Part, add_options, answer, is_selected, run_parts
from report import failures, runs_table
from rich.console import Console
from shapes import CASES, Case, shape
from workloads import Workload

SECONDS = 9 * 60
TINY_VARIANTS = ("all mechanisms off",)  # the checks run stock TRL, and grpo_ext with all of them


def variants(workload: Workload) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Side, name, fields of the trainer's config and further keys of the specification, most informative first.

    Micro-batches are one group. "As in recipes" has an autograd graph for one row at a time.
    """
    group = {"per_device_train_batch_size": workload.generations}
    rows = {**group, "gradient_checkpointing": True}
    several = {**group, "chunk_tokens": 4 * workload.longest_row}
    off = ("CUDA graph", "stacked LoRA", "grouped attention")
    continuous = {**rows, "use_transformers_continuous_batching": True}
    return [
        ("ours", "as in recipes", rows, {}),
        ("stock", "TRL's defaults", rows, {}),
        ("ours", "four rows per chunk", several, {}),
        # Its sampler takes no logits processor that would end completions: they have the maximum length.
        ("stock", "continuous batching", continuous, {"free_lengths": True}),
        *(("ours", f"no {name}", rows, {"switched_off": [name]}) for name in off),
        ("ours", "all mechanisms off", rows, {"switched_off": off}),
        ("ours", "prompts not shared", {**rows, "share_prompt": False}, {}),
        ("ours", "one graph", {**group, "gradient_checkpointing": False}, {}),
        ("stock", "no checkpointing", {**group, "gradient_checkpointing": False}, {}),
    ]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """The description of the machine, then the first variant of every workload, the second one, and so on."""
    yield MACHINE
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
    about = {"workload": case.workload.name, "title": case.workload.title, "side": side, "variant": name, "spec": spec}
    return Part(f"{case.workload.name} {side}, {name}", spec, case.seconds, about)


def measure_variant(spec: dict[str, Any]) -> dict[str, Any]:
    from grpo_side import measure

    return measure(spec | {"shape": shape(spec["model"], is_tiny=spec["is_tiny"])})


def main() -> int:
    """Return the exit status: 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bench", SECONDS)
    options = parser.parse_args()
    if options.child:
        answer(json.loads(options.child), measure_variant)
        return 0
    selected = [part for part in parts(options) if is_selected(part, options.only)]
    lines = run_parts(Path(__file__).resolve(), selected, options)
    runs = [line for line in lines if "workload" in line]
    Console(width=None if sys.stdout.isatty() else 200).print(runs_table(runs))
    return int(failures(lines) > 0)


if __name__ == "__main__":
    sys.exit(main())
