"""`grpo-ext plan --model Qwen/Qwen2.5-0.5B-Instruct --gpu 8GB`: does a model fit, and with which settings?"""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show
from grpo_ext.machine import GIB

if TYPE_CHECKING:
    from grpo_ext.memory.plan import Footprint, Plan
    from grpo_ext.memory.step_shapes import StepShape
    from grpo_ext.model.load import PolicyConfig

OPTION_NAMES = {
    "generations": "completions per prompt",
    "prompt": "prompt tokens",
    "completion": "completion tokens",
    "chunk_tokens": "chunk_tokens",
}
PASS_RATES = (0.1, 0.3, 0.5)  # of a single completion
REMARKS = {"nf4": "with quantisation constants; head, embeddings and norms are not quantised"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; names and defaults are those of the recipes."""
    parser.add_argument("--model", required=True, help="a Hub name or a folder; only its config is read")
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--gpu", type=memory_size, metavar="SIZE", help="memory of the card, for example 8GB")
    device.add_argument(
        "--cpu", type=memory_size, metavar="SIZE", help="memory for a run without a GPU, for example 16GB"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt; default: %(default)s")
    parser.add_argument(
        "--completion",
        "--max_completion_length",
        type=int,
        default=256,
        help="maximum tokens per completion; default: %(default)s",
    )
    parser.add_argument(
        "--generations", "--num_generations", type=int, default=8, help="completions per prompt; default: %(default)s"
    )
    parser.add_argument(
        "--per_device_train_batch_size", type=int, help="completions per micro-batch; default: one group"
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step; default: %(default)s"
    )
    parser.add_argument(
        "--chunk_tokens",
        type=_chunk_tokens,
        default="auto",
        metavar="NUMBER|auto|none",
        help="maximum tokens with an autograd graph at any one time in the update; auto: one completion with its "
        "prompt, the least that such a run needs; none: as --gradient_checkpointing says; default: auto",
    )
    parser.add_argument(
        "--gradient_checkpointing",
        type=_flag,
        default=True,
        metavar="true|false",
        help="with --chunk_tokens none, process one completion at a time in the update; false for no limit; default: "
        "true",
    )
    parser.add_argument(
        "--beta", type=float, default=0.1, help="weight of the KL; 0 for no reference; default: %(default)s"
    )
    parser.add_argument("--load_in_4bit", action="store_true", help="quantise the frozen base to NF4")
    parser.add_argument(
        "--use_bnb_nested_quant",
        type=_flag,
        default=True,
        metavar="true|false",
        help="also quantise the constants of NF4; default: true",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="dtype of the frozen base; default: the one that a run would use",
    )
    parser.add_argument("--lora_r", type=int, default=16, help="rank of the adapter; default: %(default)s")
    parser.add_argument(
        "--lora_target_modules", nargs="+", default=["all-linear"], help="layers with an adapter; default: all-linear"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    quiet_libraries()
    from grpo_ext.memory.plan import plan_memory

    policy, step = plan_inputs(options)
    device_type = "cuda" if options.gpu else "cpu"
    made = plan_memory(policy, step, device_type=device_type, memory=options.gpu or options.cpu)
    if options.json:
        show(json.dumps(_as_json(made)))
    else:
        _show(
            made, f"{options.model} on a {'GPU' if options.gpu else 'CPU'} of {made.memory / GIB:.3g} GB", device_type
        )


def plan_inputs(options: argparse.Namespace) -> "tuple[PolicyConfig, StepShape]":
    """The policy and the step to plan, from the command line."""
    from grpo_ext.memory.step_shapes import StepShape
    from grpo_ext.model.load import PolicyConfig

    step = StepShape(
        prompt=options.prompt,
        completion=options.completion,
        generations=options.generations,
        rows=options.per_device_train_batch_size or options.generations,
        accumulation=options.gradient_accumulation_steps,
        chunk_tokens=None if options.chunk_tokens == "auto" else options.chunk_tokens,
        gradient_checkpointing=options.gradient_checkpointing or options.chunk_tokens == "auto",
        beta=options.beta,
    )
    names = ["load_in_4bit", "use_bnb_nested_quant", "dtype", "lora_r", "lora_target_modules"]
    policy = PolicyConfig(model_name_or_path=options.model, **{name: getattr(options, name) for name in names})
    return policy, step


def memory_size(text: str) -> float:
    """`8GB`, `7.5gb`, `8` -> bytes; one GB is 2^30 bytes, as card vendors count it."""
    try:
        value = float(text.lower().removesuffix("b").removesuffix("i").removesuffix("g"))
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Type 8GB, for example.")
    return value * GIB


def _chunk_tokens(text: str) -> int | str | None:
    if text.lower() in ("auto", "none"):
        return None if text.lower() == "none" else "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number, auto nor none.") from None


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false.")
    return text.lower() == "true"


def _as_json(made: "Plan") -> dict[str, object]:
    footprint = made.footprint
    return {
        "fits": made.fits,
        "total": round(footprint.total),
        "room": round(made.budget),
        "memory": round(made.memory),
        "step": asdict(made.step),
        "lines": {what: round(amount) for what, amount, _ in footprint_lines(footprint)},
        "phases": {name: round(footprint.total_in(name)) for name in footprint.phases},
        "largest": made.largest,
        "group_sizes": [asdict(option) | {"total": round(option.total)} for option in group_options(made)],
        "changes": [{"change": change, "total": round(total)} for change, total in made.changes],
    }


@dataclass(frozen=True, kw_only=True)
class GroupOption:
    """A number of completions per prompt for the planned rollout.

    Attributes:
        prompts: prompts per rollout.
        total: bytes at the peak of a step.
        mixed: expected share of groups with right and wrong completions, per pass rate of a completion.
        is_auto: whether `num_generations=auto` selects it.
    """

    num_generations: int
    prompts: int
    total: float
    mixed: dict[float, float]
    is_auto: bool


def group_options(made: "Plan") -> list[GroupOption]:
    """The planned group size and its alternatives, in increasing order."""
    from grpo_ext.memory.auto_group_size import auto_size, mixed_share

    rollout = made.step.rows * made.step.accumulation
    return [
        GroupOption(
            num_generations=size,
            prompts=rollout // size,
            total=total,
            mixed={rate: mixed_share(size, rate) for rate in PASS_RATES},
            is_auto=size == auto_size(rollout),
        )
        for size, total in made.by_group_size.items()
    ]


def footprint_lines(footprint: "Footprint") -> list[tuple[str, float, str]]:
    """Item, bytes and remark for everything in memory at the peak of a step; the bytes add up to the total."""
    peak = footprint.peak_phase
    phase = footprint.phases[peak]
    rows = [(f"weights, {kind}", amount, REMARKS.get(kind, "")) for kind, amount in footprint.weights.items()]
    rows.append(("adapter, gradients, AdamW", footprint.trained, "float32"))
    states = "of all completions" if peak == "sampling" else "of the prompt, once for its whole group"
    rows.append((f"{peak}: keys and values", phase.cache, states))
    rows.append((f"{peak}: vocabulary tile", phase.head, "" if phase.head else "not in memory at the peak"))
    rest = footprint.total - footprint.overhead - sum(amount for _, amount, _ in rows)
    rows.append((f"{peak}: the rest", rest, "activations, their gradients, KV copies"))
    rows.append(("overhead", footprint.overhead, "everything except tensors"))
    return rows


def _show(made: "Plan", title: str, device_type: str) -> None:
    from grpo_ext.memory.plan import RESERVED_FRACTION, with_size

    footprint = made.footprint
    table = Table(title=title, title_justify="left")
    table.add_column("peak of a step")
    table.add_column("GB", justify="right")
    table.add_column("")
    for what, amount, remark in footprint_lines(footprint):
        table.add_row(what, _gb(amount), Text(remark, "dim"))
    table.add_section()
    table.add_row("total", _gb(footprint.total), Text("fits", "green") if made.fits else Text("does not fit", "red"))
    table.add_row(
        "available",
        _gb(made.budget),
        Text(f"{made.memory / GIB:.3g} GB minus a reserve of {RESERVED_FRACTION:.0%}", "dim"),
    )
    show(table)
    others = [name for name in footprint.phases if name != footprint.peak_phase]
    each = ", ".join(f"{name} {_gb(footprint.total_in(name))}" for name in others)
    show(f"Total of the other phases, in GB: {each}.")
    if made.fits:
        show("Largest values that fit, each with the others unchanged:")
    for name, value in made.largest.items() if made.fits else ():
        asked = getattr(made.step, name)
        found = {0: "no limit needed", None: "none"}.get(value, f"{value}")
        remark = f"  (requested: {asked})" if asked else ""
        if name == "generations" and value and made.step.rows != made.step.generations:
            remark += f"  with --per_device_train_batch_size {with_size(made.step, name, value).rows}"
        show(f"  {OPTION_NAMES[name]:<24} {found}{remark}")
    if not made.fits:
        show("It does not fit. Change these flags, in this order; each line gives the total with it and those above:")
        width = max((len(change) for change, _ in made.changes), default=0)
        for change, total in made.changes:
            show(f"  {change:<{width}} {_gb(total)} GB, {'fits' if total <= made.budget else 'does not fit yet'}")
        if not made.changes or made.changes[-1][1] > made.budget:
            show("  Use a smaller model, or shorter prompts.")
    _show_groups(made)
    if device_type == "cuda":
        show("These figures are calculated. Plans for a GPU have not been compared with a real card yet.")


def _show_groups(made: "Plan") -> None:
    rates = ", ".join(map(str, PASS_RATES))
    show(f"Group sizes for this rollout, with the share of mixed groups at pass rates of {rates}:")
    for option in group_options(made):
        remarks = {
            "requested": option.num_generations == made.step.generations,
            "auto": option.is_auto,
            "does not fit": option.total > made.budget,
        }
        remark = ", ".join(remark for remark, holds in remarks.items() if holds)
        sizes = f"{option.num_generations:>2} x {option.prompts} prompt{'s' * (option.prompts > 1)}"
        shares = "  ".join(f"{share:.2f}" for share in option.mixed.values())
        show(f"  {sizes:<24} {_gb(option.total)} GB  {shares}" + (f"  ({remark})" if remark else ""))


def _gb(amount: float) -> str:
    return f"{amount / GIB:.2f}"
