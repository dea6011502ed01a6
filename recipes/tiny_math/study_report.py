"""The results of a study as a picture and as a table, from the points of its curves. Nothing is run here.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. The curves are dashed so that both can be
seen if two are equal.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_ext.report.plot_data import PALETTE
from grpo_ext.evaluation.estimates import Estimate

Points = list[dict[str, Any]]

# The sweep: an arm per rank of the adapter, or full fine-tuning, and learning rate.
RANKS = {"r1": "rank 1", "r4": "rank 4", "r16": "rank 16", "r64": "rank 64", "full": "full fine-tuning"}
RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")

NAMES = {
    "sequence": "sequence-level GRPO (k3)",
    "token": "token-level GRPO",
    "stock": "stock TRL, same settings as token-level",
    "exact": "sequence-level GRPO, exact KL",
    "keep": "keep (beta = 0)",
    "skip": "skip (beta = 0)",
    "resample": "resample (beta = 0)",
    "off": "1/4 learnable: curriculum off",
    "pools": "1/4 learnable: pools, p(1-p)",
    "pools_worth": "1/4 learnable: pools, probability of a mixed group",
    "pools_started": "1/4 learnable: pools, p(1-p), with start values",
    "rare_off": "1/16 learnable: curriculum off",
    "rare_pools": "1/16 learnable: pools, p(1-p)",
    "rare_pools_worth": "1/16 learnable: pools, probability of a mixed group",
    "rare_pools_started": "1/16 learnable: pools, p(1-p), with start values",
    **{f"{rank}_{rate}": f"{name}, {rate}" for rank, name in RANKS.items() for rate in RATES},
}
PANELS = {
    "Objective": ("sequence", "token", "stock"),
    "KL estimator": ("sequence", "exact"),
    "Dead groups, beta = 0": ("keep", "skip", "resample"),
    "A quarter can be learned": ("off", "pools", "pools_worth", "pools_started"),
    "A sixteenth can be learned": ("rare_off", "rare_pools", "rare_pools_worth", "rare_pools_started"),
    **{name.capitalize(): tuple(f"{rank}_{rate}" for rate in RATES) for rank, name in RANKS.items()},
}
STYLES = [
    (PALETTE["blue"], "o", "-"),
    (PALETTE["orange"], "s", "--"),
    (PALETTE["green"], "^", ":"),
    (PALETTE["purple"], "v", "-."),
    (PALETTE["red"], "D", "-"),
]
GOAL = 0.9  # share of sampled answers that are right


def draw(points: Points, path: Path) -> Path:
    """One panel per comparison that was run: each seed as a thin line, their mean as a thick one."""
    found = {point["arm"] for point in points}
    panels = {title: arms for title, arms in PANELS.items() if found.intersection(arms)}
    figure = Figure(figsize=(0.5 + 4.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
        for arm, (colour, marker, dashes) in zip(arms, STYLES, strict=False):
            runs = _runs(points, arm)
            for run in runs:
                axes.plot(list(run), list(run.values()), dashes, color=colour, alpha=0.35, linewidth=0.8)
            if runs:
                mean = {step: statistics.fmean(run[step] for run in runs) for step in runs[0]}
                line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.8, "label": NAMES[arm]}
                axes.plot(list(mean), list(mean.values()), dashes, **line)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.axes[0].set_ylabel("held-out pass@1, sampled", fontsize=9)
    figure.savefig(path, dpi=110)
    return path


def table(points: Points) -> str:
    """One row per arm, in Markdown. The intervals pool the answers of all seeds, so they exclude the variation between
    runs, which the picture shows."""
    lines = [
        f"| | seeds | sampled pass@1 | greedy pass@1 | steps to {GOAL:g} sampled | seconds per step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, name in NAMES.items():
        runs = _runs(points, arm)
        if not runs:
            continue
        first, *_, last = runs[0]
        change = {
            column: " -> ".join(str(_pooled(points, arm, step, column)) for step in (first, last))
            for column in ("right", "right_greedy")
        }
        seconds = statistics.fmean(p["seconds_per_step"] for p in _of(points, arm) if p["step"] == last)
        cells = [name, len(runs), change["right"], change["right_greedy"], _median_steps(runs), f"{seconds:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def sweep_table(points: Points) -> str:
    """One row per rank and one column per learning rate, in Markdown: the median number of steps to the goal, and the
    share of sampled answers that are right after the last step, over all seeds."""
    lines = [f"| | {' | '.join(RATES)} |", "| --- " * (1 + len(RATES)) + "|"]
    for rank, name in RANKS.items():
        cells = [_sweep_cell(points, f"{rank}_{rate}") for rate in RATES]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sweep_cell(points: Points, arm: str) -> str:
    runs = _runs(points, arm)
    if not runs:
        return ""
    last = max(runs[0])
    return f"{_median_steps(runs)} ({statistics.fmean(run[last] for run in runs):.2f})"


def _of(points: Points, arm: str) -> Points:
    return [point for point in points if point["arm"] == arm]


def _runs(points: Points, arm: str) -> list[dict[int, float]]:
    """The curve of each seed, step -> share right."""
    runs: dict[int, dict[int, float]] = {}
    for point in _of(points, arm):
        runs.setdefault(point["seed"], {})[point["step"]] = point["right"] / point["answers"]
    return list(runs.values())


def _pooled(points: Points, arm: str, step: int, column: str) -> Estimate:
    there = [point for point in _of(points, arm) if point["step"] == step]
    right, answers = (sum(point[name] for point in there) for name in (column, "answers"))
    return Estimate.of([1.0] * right + [0.0] * (answers - right))


def _median_steps(runs: list[dict[int, float]]) -> str:
    steps = statistics.median(_steps_to_goal(run) for run in runs)
    return f"{steps:g}" if math.isfinite(steps) else f"more than {max(runs[0])}"


def _steps_to_goal(run: dict[int, float]) -> float:
    return next((step for step, share in run.items() if share >= GOAL), math.inf)
