"""`curves.png`: what happened in a run, in nine panels, drawn from `metrics.jsonl` alone.

Raw values are dots, the line is their running mean over a tenth of the run, held-out accuracy has its 95% band.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_ext.report.metrics import METRICS_FILE, read_metrics

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PHASES = {"generate": BLUE, "reward": ORANGE, "reference": GREEN, "update": PURPLE}
CURVES_FILE = "curves.png"
Rows = list[dict[str, Any]]


def draw_curves(output_dir: str | Path) -> Path:
    """Draw `output_dir/curves.png` and return its path; works on a run that is still going or that died.

    Raises:
        ValueError: the folder has no metrics.
    """
    rows = read_metrics(Path(output_dir) / METRICS_FILE)
    if not rows:
        raise ValueError(f"'{output_dir}' has no {METRICS_FILE} with a logged step.")
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, Callable[[Axes, Rows], None]]] = [
        ("Held-out pass@1", _accuracy),
        ("Mean raw reward", lambda axes, rows: _series(axes, rows, "reward", BLUE)),
        ("Dead groups (all rewards equal)", _dead_groups),
        ("Mean normalised reward (0 by construction)", _normalised),
        ("Completion length and share cut off", _lengths),
        ("KL towards the reference", _kl),
        ("Token entropy", lambda axes, rows: _series(axes, rows, "entropy", GREEN, "nats per token")),
        ("Total loss (not a measure of progress)", lambda axes, rows: _series(axes, rows, "loss", RED)),
        ("Time per step", _phases),
    ]
    for axes, (title, draw) in zip(figure.subplots(3, 3).flat, panels, strict=True):
        draw(axes, rows)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    path = Path(output_dir) / CURVES_FILE
    figure.savefig(path, dpi=110)
    return path


def _values(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have this metric."""
    present = [row for row in rows if row.get(name) is not None]
    return np.array([row["step"] for row in present]), np.array([row[name] for row in present], dtype=float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the run; at the ends over the part of the window that exists."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _series(axes: Axes, rows: Rows, name: str, colour: str, unit: str = "", label: str | None = None) -> None:
    steps, values = _values(rows, name)
    if len(steps):
        axes.plot(steps, values, ".", color=colour, alpha=0.3, markersize=4)
        axes.plot(steps, _running_mean(values), color=colour, linewidth=1.8, label=label)
    axes.set_ylabel(unit, fontsize=9)


def _accuracy(axes: Axes, rows: Rows) -> None:
    for name, colour, label in (("pass@1", BLUE, "greedy"), ("sampled_pass@1", ORANGE, "sampled")):
        steps, values = _values(rows, f"heldout/{name}")
        if len(steps):
            low, high = _values(rows, f"heldout/{name}/low")[1], _values(rows, f"heldout/{name}/high")[1]
            axes.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.8, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share right, 95% interval", fontsize=9)


def _dead_groups(axes: Axes, rows: Rows) -> None:
    name = "frac_dead_groups" if any("frac_dead_groups" in row for row in rows) else "frac_reward_zero_std"
    _series(axes, rows, name, RED, "share of groups")
    axes.set_ylim(0, 1.02)


def _normalised(axes: Axes, rows: Rows) -> None:
    _series(axes, rows, "advantages/mean", BLUE, "advantage", "mean")
    _series(axes, rows, "advantages/mean_abs", SKY, "advantage", "mean of |advantage|")


def _lengths(axes: Axes, rows: Rows) -> None:
    _series(axes, rows, "completions/mean_length", BLUE, "tokens", "mean length")
    steps, values = _values(rows, "completions/clipped_ratio")
    share = axes.twinx()
    share.plot(steps, values, color=RED, linewidth=1.2, linestyle="--")
    share.set_ylim(0, 1.02)
    share.set_ylabel("share cut off (dashed)", fontsize=9, color=RED)
    share.tick_params(labelsize=8)
    share.spines[["top"]].set_visible(False)


def _kl(axes: Axes, rows: Rows) -> None:
    _series(axes, rows, "kl_sequence", PURPLE, "nats", "per answer")
    _series(axes, rows, "kl", SKY, "nats", "per token")


def _phases(axes: Axes, rows: Rows) -> None:
    timed = [row for row in rows if row.get("time/update") is not None]
    if timed:
        steps = [row["step"] for row in timed]
        layers = [[row.get(f"time/{phase}", 0.0) for row in timed] for phase in PHASES]
        axes.stackplot(steps, layers, labels=list(PHASES), colors=list(PHASES.values()), alpha=0.8)
    axes.set_ylabel("seconds", fontsize=9)
