"""Compare whole GRPO steps of stock TRL and of grpo_ext: seconds per phase, and peak memory excluding the weights.

    python tests/benchmarks/compare_trl.py --quick            # a first look: two small workloads, one step each
    python tests/benchmarks/compare_trl.py                    # every workload and variant
    python tests/benchmarks/compare_trl.py --only W3,W5 --variants "1 row/default" --steps 1
    python tests/benchmarks/compare_trl.py --scale-g          # for growing numbers of completions per prompt
    python tests/benchmarks/compare_trl.py --bf16 --tf32      # in the precision of a run on a GPU

Workloads, in tokens of a prompt (S), tokens of a completion (C) and completions per prompt (G):

    W1    one prompt, S=512, C=64, G=8
    W2    one prompt, S=64, C=128, G=8
    W3    one prompt, S=2048, C=64, G=16
    W4    4 prompts, S from 128 to 384, C from 6 to 256 (mean 64), G=8
    W5    8 prompts, S from 100 to 218 (mean 150), C from 52 to 256 (mean 181), G=8: the usual shape of GSM8K

The model has the shape of SmolLM2-135M, with random weights and LoRA r=16 on every linear layer, in float32 unless
`--bf16` is given. Prompts and completion lengths are the same on both sides. Every variant runs in its own process, on
the GPU if there is one. Ratios compare with stock TRL at its best: with its fastest variant for time, and with its
smallest for memory.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import INTERRUPTED, Children, add_options, answer, console
from report import BenchFile, failures, outcome, ratios, runs_table, scale_table
from workloads import FULL, QUICK, SCALE, SMOLLM2_135M, TINY, Workload, tiny

Settings = Callable[[Workload], dict[str, Any]]  # fields of the trainer's config, in addition to the common ones

SMALL_CHUNK = 64  # tokens, also of the segments in which a prompt is prefilled

# Without settings: all rows in one micro-batch, gradient checkpointing off.
STOCK: dict[str, Settings] = {
    "all rows": lambda workload: {},
    "all rows, checkpointing": lambda workload: {"gradient_checkpointing": True},
    "1 row": lambda workload: {"per_device_train_batch_size": 1},
    "1 row, checkpointing": lambda workload: {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
}
OURS: dict[str, Settings] = {
    "default": lambda workload: {},
    "2 rows": lambda workload: {"per_device_train_batch_size": 2},
    "one row at a time": lambda workload: {"chunk_tokens": workload.longest_row},
    "small chunks": lambda workload: {"chunk_tokens": SMALL_CHUNK},
}
VARIANTS = {"stock": STOCK, "ours": OURS}
QUICK_VARIANTS = {"stock": ("all rows", "1 row, checkpointing"), "ours": ("default",)}
# Tried in this order, until one fits.
SCALE_VARIANTS = {"stock": ("all rows", "1 row"), "ours": ("default", "one row at a time")}


def main() -> int:
    """Return the exit status: 1 if a run failed for a reason other than memory, or none was run, 130 after Ctrl-C."""
    arguments = _parser().parse_args()
    if arguments.child:
        from grpo_side import measure

        answer(measure(json.loads(arguments.child)))
        return 0

    terminal = console()
    limits = (arguments.threads, arguments.memory_limit)
    children = Children(Path(__file__).resolve(), *limits, terminal, exact_memory=arguments.exact_memory)
    shape = TINY if arguments.tiny else SMOLLM2_135M
    file = BenchFile(arguments.out, arguments.threads, shape, ratios)
    status = 0
    try:
        (_scale if arguments.scale_g else _compare)(arguments, children, file, shape)
    except KeyboardInterrupt:
        terminal.print("interrupted; the results so far are kept")
        status = INTERRUPTED
    if not file.runs:
        terminal.print("nothing was run: no workload and variant matches all of the options")
        return status or 1
    if arguments.scale_g:
        terminal.print(scale_table(file.runs))
    else:
        terminal.print(runs_table(file.runs))
    terminal.print(f"all numbers: {arguments.out}")
    return status or int(failures(file.runs) > 0)


def _compare(arguments: argparse.Namespace, children: Children, file: BenchFile, shape: dict[str, Any]) -> None:
    variants = QUICK_VARIANTS if arguments.quick or arguments.tiny else VARIANTS
    plan = [
        (workload, side, variant)
        for name, workload in (QUICK if arguments.quick else FULL).items()
        if arguments.only is None or name in arguments.only
        for side in arguments.sides
        for variant in (variants if arguments.variants is None else VARIANTS)[side]
        if arguments.variants is None or variant in arguments.variants
    ]
    for number, (workload, side, variant) in enumerate(plan, start=1):
        _run(arguments, children, file, shape, workload, side, variant, f"({number}/{len(plan)})")


def _scale(arguments: argparse.Namespace, children: Children, file: BenchFile, shape: dict[str, Any]) -> None:
    workloads = [workload for name, workload in SCALE.items() if arguments.only is None or name in arguments.only]
    for number, workload in enumerate(workloads, start=1):
        for side in arguments.sides:
            for variant in SCALE_VARIANTS[side]:
                _run(arguments, children, file, shape, workload, side, variant, f"({number}/{len(workloads)})")
                if "does_not_fit" not in file.runs[-1]:
                    break


def _run(
    arguments: argparse.Namespace,
    children: Children,
    file: BenchFile,
    shape: dict[str, Any],
    workload: Workload,
    side: str,
    variant: str,
    place: str,
) -> None:
    workload = tiny(workload) if arguments.tiny else workload
    # In a run by G, the warm-up step also counts the operations, which depend on its size.
    warmup_workload = workload if arguments.scale_g else tiny(workload)
    spec = {
        "side": side,
        "workload": workload.as_dict(),
        "shape": shape,
        "settings": VARIANTS[side][variant](workload),
        "warmup": arguments.warmup,
        "warmup_workload": warmup_workload.as_dict(),
        "steps": 1 if arguments.quick or arguments.tiny else arguments.steps,
        "scale": arguments.scale_g,
        "bf16": arguments.bf16,
        "tf32": arguments.tf32,
    }
    label = f"{place} {workload.title}  {side}, {variant}"
    run = {"workload": workload.name, "title": workload.title, "side": side, "variant": variant, "spec": spec}
    file.add(run | children.run(spec, label))
    children.console.print(f"{label}: {outcome(file.runs[-1])}", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small workloads, three variants, one step")
    parser.add_argument(
        "--scale-g", action="store_true", help="S=512, C=64, G from 2 to 64, and the share of the machine's peak"
    )
    parser.add_argument("--only", type=_names(*FULL, *SCALE), help="workloads, such as W1,W4; default: all")
    parser.add_argument("--sides", type=_names(*VARIANTS), default=list(VARIANTS), help="stock, ours, or stock,ours")
    parser.add_argument(
        "--variants", type=_names(*STOCK, *OURS, separator="/"), help="such as '1 row/default'; default: all"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="frozen weights and autocast in bfloat16, the adapter in float32"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="float32 products on the tensor cores of a GPU, in TF32, if it has them"
    )
    add_options(
        parser,
        "bench",
        warmup="warm-up steps, with all rows but a sixteenth of the prompt tokens and an eighth of the completion "
        "tokens (with --scale-g: of full size),",
    )
    return parser


def _names(*valid: str, separator: str = ",") -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(separator)
        for name in names:
            if name not in valid:
                raise argparse.ArgumentTypeError(f"unknown: {name!r}; valid: {', '.join(valid)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
