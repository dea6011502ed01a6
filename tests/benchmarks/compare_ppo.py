"""Compare a step of the PPO trainer of TRL 1.5 with a step of grpo_ext: seconds and peak memory.

    python tests/benchmarks/compare_ppo.py

Both have the same prompts, eight rows per step, the same number of sampled tokens per row, no recomputation, and one
pass over the rows. PPO has a value model and a reward model of the policy's size; grpo_ext has neither. That trainer
trains the whole value model. Its policy is measured with LoRA, with the adapter turned off as the reference, and with
all weights trained, with a reference model. TRL 1.5.0 is downloaded once, into a separate folder that only the process
of PPO sees.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from children import INTERRUPTED, ROOT, Children, add_options, answer, console
from report import BenchFile, Run, failures, fits, outcome, peak_mib, seconds, why_no_result
from rich.console import Console
from rich.table import Table
from workloads import PPO, SMOLLM2_135M, TINY, Workload, tiny

TRL_WITH_PPO = "1.5.0"
TRL_FOLDER = ROOT / "outputs" / "cache" / f"trl-{TRL_WITH_PPO}"
PPO_VARIANTS = ("lora", "whole")


def main() -> int:
    """Return the exit status: 1 if a run failed for a reason other than memory, 130 after Ctrl-C."""
    arguments = _parser().parse_args()
    if arguments.child:
        answer(_measure(json.loads(arguments.child)))
        return 0

    terminal = console()
    _install_old_trl(terminal)
    shape = TINY if arguments.tiny else SMOLLM2_135M
    file = BenchFile(arguments.out, arguments.threads, shape, ratios)
    status = 0
    plan = [(workload, *side) for workload in PPO.values() for side in _sides(workload, is_tiny=arguments.tiny)]
    try:
        for number, (workload, side, variant, spec) in enumerate(plan, start=1):
            path = (TRL_FOLDER, ROOT) if side == "ppo" else (ROOT,)
            limits = (arguments.threads, arguments.memory_limit)
            children = Children(Path(__file__).resolve(), *limits, terminal, path, exact_memory=arguments.exact_memory)
            spec |= {"shape": shape, "warmup": arguments.warmup, "steps": arguments.steps}
            title = Workload.from_dict(spec["workload"]).title
            label = f"({number}/{len(plan)}) {title}  {side}, {variant}"
            run = {"workload": workload.name, "title": title, "side": side, "variant": variant, "spec": spec}
            file.add(run | children.run(spec, label))
            terminal.print(f"{label}: {outcome(file.runs[-1])}", markup=False, highlight=False)
    except KeyboardInterrupt:
        terminal.print("interrupted; the results so far are kept")
        status = INTERRUPTED
    terminal.print(_table(file.runs))
    terminal.print(f"all numbers: {arguments.out}")
    return status or int(failures(file.runs) > 0)


def _sides(workload: Workload, *, is_tiny: bool) -> list[tuple[str, str, dict[str, Any]]]:
    workload = tiny(workload) if is_tiny else workload
    common = {"workload": workload.as_dict()}
    ours = common | {"side": "ours", "warmup_workload": workload.as_dict(), "scale": False}
    return [
        *(("ppo", policy, common | {"policy": policy}) for policy in PPO_VARIANTS),
        ("ours", "default", ours | {"settings": {}}),
        ("ours", "one row at a time", ours | {"settings": {"chunk_tokens": workload.longest_row}}),
    ]


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one side, in the child: each side imports its own version of TRL."""
    if "policy" in spec:
        import ppo_side

        return ppo_side.measure(spec)
    import grpo_side

    return grpo_side.measure(spec)


def _install_old_trl(terminal: Console) -> None:
    if (TRL_FOLDER / f"trl-{TRL_WITH_PPO}.dist-info").is_dir():
        return
    terminal.print(f"installing trl {TRL_WITH_PPO} into {TRL_FOLDER}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(TRL_FOLDER), f"trl=={TRL_WITH_PPO}"], check=True)


def ratios(runs: list[Run]) -> list[dict[str, Any]]:
    """Each variant of PPO divided by each of ours: above 1, ours is faster or smaller."""
    return [
        {
            "workload": ppo["workload"],
            "ppo": ppo["variant"],
            "ours": ours["variant"],
            "step_time": seconds(ppo, "step") / seconds(ours, "step"),
            "peak_memory": peak_mib(ppo) / peak_mib(ours),
            "peak_memory_with_weights": _with_weights(ppo) / _with_weights(ours),
        }
        for ppo in runs
        for ours in runs
        if fits(ppo) and fits(ours) and (ppo["side"], ours["side"]) == ("ppo", "ours")
        if ppo["workload"] == ours["workload"]
    ]


def _with_weights(run: Run) -> float:
    return peak_mib(run) + run["result"]["weights_mib"]


def _table(runs: list[Run]) -> Table:
    table = Table(
        "workload", "side", "variant", title="Median step time, and peak memory without and with the models' weights"
    )
    for name in ("step (s)", "peak (MiB)", "with weights (MiB)"):
        table.add_column(name, justify="right")
    for name in ("ours is faster by", "is smaller by", "with weights by"):
        table.add_column(f"{name}, default", justify="right")
    compared = {(row["workload"], row["ppo"]): row for row in ratios(runs) if row["ours"] == "default"}
    for run in runs:
        head = [run["title"], run["side"], run["variant"]]
        if not fits(run):
            table.add_row(*head, why_no_result(run))
            continue
        row = compared.get((run["workload"], run["variant"])) if run["side"] == "ppo" else None
        names = ("step_time", "peak_memory", "peak_memory_with_weights")
        table.add_row(
            *head,
            f"{seconds(run, 'step'):.2f}",
            f"{peak_mib(run):.0f}",
            f"{_with_weights(run):.0f}",
            *(f"{row[name]:.2f}x" if row else "" for name in names),
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "ppo", warmup="warm-up steps")
    return parser


if __name__ == "__main__":
    sys.exit(main())
