"""The panels of a run, in order: one definition for `curves.png` and `report.html`.

In: the rows of `metrics.jsonl`. Out: panels of lines with raw and smoothed values, ready to be drawn. A metric that the
run did not log has no panel.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

from dataclasses import dataclass, replace

import numpy as np

from grpo_ext.machine import GIB
from grpo_ext.report.run_files import Row

PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
}
MAX_MARKED_POINTS = 60  # lines with up to this many points get a marker per point
MAX_POINTS = 1000  # per line; in a longer run, each point is the mean of several steps
# A reward with one of these words in its name judges the shape of a text, not whether the answer is right.
SHAPE_WORDS = ("format", "length", "coherence", "tag", "language")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Attributes:
        x, y: coordinates of the points.
        label: label in the legend; "" if it is the only line of the panel.
        colour: a name of `PALETTE`.
        mean: the running mean of y; empty if the line connects the points themselves.
        low, high: bounds of a band around the line; empty for no band.
        on_right_axis: whether its values belong to the axis on the right.
        is_dashed: whether it is drawn dashed.
    """

    x: list[float]
    y: list[float]
    label: str
    colour: str
    mean: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    on_right_axis: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines that share a pair of axes.

    Attributes:
        title: title of the panel.
        unit: label of the y axis.
        lines: the lines, in the order of the legend.
        right_label: label of the axis on the right; "" for no such axis.
        x_label: label of the x axis, "step" in most panels.
        is_stacked: whether the running means of the lines are drawn as stacked layers.
        is_share: whether y is a share, from 0 to 1.
    """

    title: str
    unit: str
    lines: list[Line]
    right_label: str = ""
    x_label: str = "step"
    is_stacked: bool = False
    is_share: bool = False


def build_panels(rows: list[Row]) -> list[Panel]:
    """Every panel for which these rows have values, the most important ones first."""
    named = sorted({name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")})
    shape = [name for name in named if any(word in name for word in SHAPE_WORDS)]
    right = [name for name in named if name not in shape]
    is_whole = len(named) == 1  # a single reward equals the mean raw reward, which has its own panel
    kl = "kl_sequence" if any("kl_sequence" in row for row in rows) else "kl"
    panels = [
        _accuracy_panel(rows),
        Panel(
            title="Rewards for being right", unit="mean reward", lines=[] if is_whole else _reward_lines(rows, right)
        ),
        Panel(title="Rewards for the shape of the text", unit="mean reward", lines=_reward_lines(rows, shape)),
        Panel(title="Mean raw reward", unit="mean of all completions", lines=_smoothed_line(rows, "reward", "blue")),
        Panel(
            title="Groups by their rewards",
            unit="share of groups",
            is_stacked=True,
            is_share=True,
            lines=_stacked_layers(rows, "frac_groups/", {"all_wrong": "red", "mixed": "green", "all_right": "blue"}),
        ),
        Panel(
            title="Training problems by pool",
            unit="share of problems",
            is_stacked=True,
            is_share=True,
            lines=_stacked_layers(
                rows, "pools/", {"unsolved": "red", "learning": "green", "solved": "blue", "unseen": "sky"}
            ),
        ),
        _length_panel(rows),
        _reward_vs_kl_panel(rows, kl),
        Panel(
            title="KL to the reference",
            unit="nats per completion" if kl == "kl_sequence" else "nats per token",
            lines=_smoothed_line(rows, kl, "purple"),
        ),
        Panel(title="Token entropy", unit="nats per token", lines=_smoothed_line(rows, "entropy", "green")),
        Panel(
            title="Gradient norm",
            unit="before clipping",
            lines=_smoothed_line(rows, "grad_norm", "orange", "norm")
            + _right_axis_line(rows, "nonfinite/skipped", "skipped so far"),
            right_label="updates skipped",
        ),
        Panel(
            title="Time per step",
            unit="seconds",
            is_stacked=True,
            lines=_stacked_layers(
                rows, "time/", {"generate": "blue", "reward": "orange", "reference": "green", "update": "purple"}
            ),
        ),
        Panel(title="Peak memory so far", unit="GB", lines=_line(rows, "peak_memory_mb", "sky", scale=1e6 / GIB)),
        Panel(
            title="Mean normalised reward",
            unit="advantage",
            lines=_smoothed_line(rows, "advantages/mean", "blue", "mean (0 by construction)")
            + _smoothed_line(rows, "advantages/mean_abs", "sky", "mean size"),
        ),
        Panel(title="Total loss (not a measure of progress)", unit="loss", lines=_smoothed_line(rows, "loss", "red")),
    ]
    return [_simplified(panel) for panel in panels if panel.lines]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the run, which is shorter at both ends of the run."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means = (sums[last] - sums[first]) / (last - first)
    return np.clip(means, values.min(), values.max()) if len(values) else means  # rounding may exceed the range


def _simplified(panel: Panel) -> Panel:
    """The panel without an unused axis on the right, and without the label of a single line."""
    right_label = panel.right_label if any(line.on_right_axis for line in panel.lines) else ""
    lines = [replace(panel.lines[0], label="")] if len(panel.lines) == 1 else panel.lines
    return replace(panel, right_label=right_label, lines=lines)


def _columns(rows: list[Row], *names: str) -> list[np.ndarray]:
    """The values of these metrics in the rows that have all of them, averaged over adjacent rows to MAX_POINTS."""
    present = [row for row in rows if all(row.get(name) is not None for name in names)]
    columns = np.array([[row[name] for name in names] for row in present], dtype=float).reshape(-1, len(names))
    width = -(-len(columns) // MAX_POINTS)
    if width > 1:
        columns = np.array([columns[i : i + width].mean(axis=0) for i in range(0, len(columns), width)])
    return list(columns.T)


def _line(rows: list[Row], name: str, colour: str, label: str = "", scale: float = 1.0) -> list[Line]:
    x, y = _columns(rows, "step", name)
    return [Line(x=x.tolist(), y=(y * scale).tolist(), label=label, colour=colour)] if len(x) else []


def _smoothed_line(rows: list[Row], name: str, colour: str, label: str = "") -> list[Line]:
    return [replace(line, mean=tuple(running_mean(np.array(line.y)))) for line in _line(rows, name, colour, label)]


def _right_axis_line(rows: list[Row], name: str, label: str) -> list[Line]:
    return [replace(line, on_right_axis=True, is_dashed=True) for line in _line(rows, name, "red", label)]


def _reward_lines(rows: list[Row], names: list[str]) -> list[Line]:
    """A line for each of the first six reward functions."""
    return [
        line
        for name, colour in zip(names, PALETTE, strict=False)
        for line in _smoothed_line(rows, name, colour, name.removeprefix("rewards/").removesuffix("/mean"))
    ]


def _stacked_layers(rows: list[Row], prefix: str, colours: dict[str, str]) -> list[Line]:
    """The layers of a stack, bottom first; a metric that a row lacks counts as 0."""
    logged = [prefix + name for name in colours if any(row.get(prefix + name) is not None for row in rows)]
    if not logged:
        return []
    some = [row for row in rows if any(row.get(name) is not None for name in logged)]
    x, *layers = _columns([dict.fromkeys(logged, 0.0) | row for row in some], "step", *logged)
    labels = [name.removeprefix(prefix) for name in logged]
    return [
        Line(
            x=x.tolist(),
            y=y.tolist(),
            mean=tuple(running_mean(y)),
            label=label.replace("_", " "),
            colour=colours[label],
        )
        for label, y in zip(labels, layers, strict=True)
    ]


def _accuracy_panel(rows: list[Row]) -> Panel:
    """Greedy pass@1, sampled pass@1 and pass@k of the largest k, as far as they were measured."""
    ks = {int(name[13:]) for row in rows for name in row if name.startswith("heldout/pass@") and name[13:].isdigit()}
    names = [("pass@1", "blue", "greedy"), ("sampled_pass@1", "orange", "sampled")]
    names += [(f"pass@{max(ks)}", "green", f"one of {max(ks)} samples")] if ks - {1} else []
    lines = []
    for name, colour, label in names:
        x, y, low, high = _columns(rows, "step", *(f"heldout/{name}{bound}" for bound in ("", "/low", "/high")))
        if len(x):
            line = Line(x=x.tolist(), y=y.tolist(), label=label, colour=colour, low=tuple(low), high=tuple(high))
            lines.append(line)
    return Panel(title="Held-out problems solved", unit="share, 95% interval", lines=lines, is_share=True)


def _length_panel(rows: list[Row]) -> Panel:
    """Mean length with a band from the shortest to the longest, and the share that was cut off on the right axis."""
    lines = _smoothed_line(rows, "completions/mean_length", "blue", "mean, shortest to longest")
    x, low, high = _columns(rows, "step", "completions/min_length", "completions/max_length")
    if lines and list(x) == lines[0].x:
        lines = [replace(lines[0], low=tuple(low), high=tuple(high))]
    lines += _right_axis_line(rows, "completions/clipped_ratio", "cut off")
    return Panel(title="Length of completions", unit="tokens", lines=lines, right_label="share cut off")


def _reward_vs_kl_panel(rows: list[Row], kl: str) -> Panel:
    """The KL at which a reward was reached: each point is a step, and the line connects the steps in order."""
    x, y = (running_mean(values) for values in _columns(rows, kl, "reward"))
    line = Line(x=x.tolist(), y=y.tolist(), label="", colour="purple")
    unit = "nats per completion" if kl == "kl_sequence" else "nats per token"
    return Panel(
        title="Reward against KL, step by step",
        unit="mean raw reward, smoothed",
        x_label=f"KL to the reference, {unit}",
        lines=[line] if len(x) else [],
    )
