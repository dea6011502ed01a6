"""Summarize runs: medians, ratios to stock TRL at its best, tables, and the JSON file."""

import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from children import GIB
from rich.table import Table

PACKAGES = ("grpo-ext", "trl", "torch", "transformers", "peft", "accelerate")
COLUMNS = ("step", "sample", "reference", "update")
WITHOUT_RESULT = ("does_not_fit", "timed_out", "not_reached", "failed")  # keys of a run, each with its reason

Run = dict[str, Any]  # workload, title, side, variant, and the result of `Children.run`


def fits(run: Run) -> bool:
    return "result" in run


def seconds(run: Run, phase: str) -> float:
    """Median over the measured steps."""
    return statistics.median(step.get(phase, 0.0) for step in run["result"]["seconds"])


def peak_mib(run: Run) -> float:
    """Peak over all phases, excluding what was resident before training."""
    return max(run["result"]["peak_mib"].values())


def why_no_result(run: Run) -> str:
    """`does not fit`, `timed out`, `not reached` or `failed`."""
    return next(name for name in WITHOUT_RESULT if name in run).replace("_", " ")


def outcome(run: Run) -> str:
    """One line about a finished run."""
    if fits(run):
        return f"{seconds(run, 'step'):.2f} s per step, {peak_mib(run):.0f} MiB excluding the weights"
    name = why_no_result(run)
    reason = run[name.replace(" ", "_")]
    return f"{name}: {reason if isinstance(reason, str) else ' | '.join(reason)}"


def ratios(runs: list[Run]) -> list[dict[str, Any]]:
    """Stock's values divided by those of each variant: above 1, the variant is faster or smaller. Times are those of
    the stock variant with the fastest step, the peak is that of the smallest one."""
    rows = []
    for workload in dict.fromkeys(run["workload"] for run in runs):
        there = [run for run in runs if run["workload"] == workload and fits(run)]
        stock = [run for run in there if run["side"] == "stock"]
        if not stock:
            continue
        fastest = min(stock, key=lambda run: seconds(run, "step"))
        smallest = min(stock, key=peak_mib)
        rows += [
            {
                "workload": workload,
                "side": run["side"],
                "variant": run["variant"],
                "stock_fastest": fastest["variant"],
                "stock_smallest": smallest["variant"],
                **{phase: seconds(fastest, phase) / seconds(run, phase) for phase in COLUMNS},
                "peak": peak_mib(smallest) / peak_mib(run),
            }
            for run in there
        ]
    return rows


def runs_table(runs: list[Run]) -> Table:
    """Seconds and peaks, each with its ratio to stock if stock was measured on the same workload."""
    table = Table(
        *("workload", "side", "variant"),
        title="Seconds (median of steps) and peak memory excluding the weights",
        caption="In parentheses: the time of stock's variant with the fastest step, or the peak of its smallest one, "
        "divided by this one. Above 1, this one is faster or smaller.",
    )
    for name in (*COLUMNS, "peak (MiB)"):
        table.add_column(name, justify="right")
    compared = {(row["workload"], row["side"], row["variant"]): row for row in ratios(runs)}
    for run in runs:
        head = [run["title"], run["side"], run["variant"]]
        if fits(run):
            row = compared.get((run["workload"], run["side"], run["variant"]))
            values = {phase: f"{seconds(run, phase):.2f}" for phase in COLUMNS} | {"peak": f"{peak_mib(run):.0f}"}
            table.add_row(*head, *(f"{value} ({row[name]:.2f}x)" if row else value for name, value in values.items()))
        else:
            table.add_row(*head, why_no_result(run))
    return table


def share_of_peak(run: Run) -> float | None:
    """The share of the machine's matrix-multiplication peak that the update reaches."""
    result = run["result"]
    if not result["update_flops"]:
        return None
    return result["update_flops"] / seconds(run, "update") / result["matmul_flops"]


def scale_table(runs: list[Run]) -> Table:
    table = Table("workload", "side", "variant", title="By group size G")
    for name in ("step (s)", "reference + update (s)", "peak (MiB)", "update GFLOP", "share of matmul peak"):
        table.add_column(name, justify="right")
    for run in runs:
        head = [run["title"], run["side"], run["variant"]]
        if not fits(run):
            table.add_row(*head, why_no_result(run))
            continue
        flops, share = run["result"]["update_flops"], share_of_peak(run)
        table.add_row(
            *head,
            f"{seconds(run, 'step'):.2f}",
            f"{seconds(run, 'reference') + seconds(run, 'update'):.2f}",
            f"{peak_mib(run):.0f}",
            "" if flops is None else f"{flops / 1e9:.1f}",
            "" if share is None else f"{share:.0%}",
        )
    return table


def machine(threads: int) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


class BenchFile:
    """The JSON file, rewritten after every run so that an interruption loses no results."""

    def __init__(self, path: Path, threads: int, model: dict[str, Any], summary: Callable[[list[Run]], Any]):
        self.runs: list[Run] = []
        self._path, self._summary = path, summary
        self._head = {
            "command": sys.argv,
            "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
            "machine": machine(threads),
            "model": model,
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        content = self._head | {"ratios": self._summary(self.runs), "runs": self.runs}
        self._path.write_text(json.dumps(content, indent=1) + "\n")


def failures(runs: Iterable[Run]) -> int:
    return sum("failed" in run for run in runs)


def installed_version(package: str) -> str | None:
    """The installed version of a package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
