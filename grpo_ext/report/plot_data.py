"""What is drawn of a run, and in which order: the same panels for `curves.png` and for `report.html`.

In: the rows of `metrics.jsonl`. Out: panels of lines with their values, smoothed, ready to be drawn. What a run did not
log has no panel.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
}
FEW = 60  # points that can be told apart
MOST_POINTS = 1000  # of a line; longer runs are drawn as means of so many neighbours
# A reward with one of these words in its name pays for the shape of a text, not for being right.
SHAPE_WORDS = ("format", "length", "coherence", "tag", "language")
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Attributes:
        x, y: of each point.
        label: "" where the panel has one line only.
        colour: a name of `PALETTE`.
        mean: a running mean of y; empty where the points themselves are joined.
        low, high: of a band around the line; empty for none.
        is_right: whether it belongs to the axis on the right.
        is_dashed: how it is drawn.
    """

    x: list[float]
    y: list[float]
    label: str
    colour: str
    mean: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    is_right: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines that are drawn together.

    Attributes:
        unit: of y.
        right: what the axis on the right shows; "" where there is none.
        x_label: "step", or what else x is.
        stacked: the running means of the lines are layers on top of each other.
        is_share: y goes from 0 to 1.
    """

    title: str
    unit: str
    lines: list[Line]
    right: str = ""
    x_label: str = "step"
    stacked: bool = False
    is_share: bool = False


def panels_of(rows: Rows) -> list[Panel]:
    """Every panel that these rows have something for, what people look at first first."""
    named = sorted({name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")})
    shape = [name for name in named if any(word in name for word in SHAPE_WORDS)]
    right = [name for name in named if name not in shape]
    is_whole = len(named) == 1  # the only reward is the mean raw reward, which has its own panel
    kl = "kl_sequence" if any("kl_sequence" in row for row in rows) else "kl"
    panels = [
        _accuracy(rows),
        Panel(title="Rewards for being right", unit="mean reward", lines=[] if is_whole else _rewards(rows, right)),
        Panel(title="Rewards for the shape of the text", unit="mean reward", lines=_rewards(rows, shape)),
        Panel(title="Mean raw reward", unit="mean of all answers", lines=_smooth(rows, "reward", "blue")),
        Panel(
            title="Groups by their rewards",
            unit="share of groups",
            stacked=True,
            is_share=True,
            lines=_layers(rows, "frac_groups/", {"all_wrong": "red", "mixed": "green", "all_right": "blue"}),
        ),
        _lengths(rows),
        _reward_against_kl(rows, kl),
        Panel(
            title="KL from the reference",
            unit="nats an answer" if kl == "kl_sequence" else "nats a token",
            lines=_smooth(rows, kl, "purple"),
        ),
        Panel(title="Token entropy", unit="nats a token", lines=_smooth(rows, "entropy", "green")),
        Panel(
            title="Gradient norm",
            unit="before clipping",
            lines=_smooth(rows, "grad_norm", "orange", "norm") + _right(rows, "nonfinite/skipped", "skipped so far"),
            right="updates skipped",
        ),
        Panel(
            title="Time of a step",
            unit="seconds",
            stacked=True,
            lines=_layers(
                rows, "time/", {"generate": "blue", "reward": "orange", "reference": "green", "update": "purple"}
            ),
        ),
        Panel(title="Peak memory so far", unit="GB", lines=_joined(rows, "peak_memory_mb", "sky", scale=1e-3)),
        Panel(
            title="Mean normalised reward",
            unit="advantage",
            lines=_smooth(rows, "advantages/mean", "blue", "mean (0 by construction)")
            + _smooth(rows, "advantages/mean_abs", "sky", "mean size"),
        ),
        Panel(title="Total loss (no measure of progress)", unit="loss", lines=_smooth(rows, "loss", "red")),
    ]
    return [_tidied(panel) for panel in panels if panel.lines]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the run; at the ends over the part of the window that exists."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means = (sums[last] - sums[first]) / (last - first)
    return np.clip(means, values.min(), values.max()) if len(values) else means  # rounding is no change


def _tidied(panel: Panel) -> Panel:
    """Without a right axis that nothing is on, and without a label where one line says what the title says."""
    right = panel.right if any(line.is_right for line in panel.lines) else ""
    lines = [replace(panel.lines[0], label="")] if len(panel.lines) == 1 else panel.lines
    return replace(panel, right=right, lines=lines)


def _values(rows: Rows, *names: str) -> list[np.ndarray]:
    """The columns of these names, in the rows that have a number in each; neighbours averaged where there are many."""
    present = [row for row in rows if all(row.get(name) is not None for name in names)]
    columns = np.array([[row[name] for name in names] for row in present], dtype=float).reshape(-1, len(names))
    width = -(-len(columns) // MOST_POINTS)
    if width > 1:
        columns = np.array([columns[i : i + width].mean(axis=0) for i in range(0, len(columns), width)])
    return list(columns.T)


def _joined(rows: Rows, name: str, colour: str, label: str = "", scale: float = 1.0) -> list[Line]:
    x, y = _values(rows, "step", name)
    return [Line(x=x.tolist(), y=(y * scale).tolist(), label=label, colour=colour)] if len(x) else []


def _smooth(rows: Rows, name: str, colour: str, label: str = "") -> list[Line]:
    return [replace(line, mean=tuple(running_mean(np.array(line.y)))) for line in _joined(rows, name, colour, label)]


def _right(rows: Rows, name: str, label: str) -> list[Line]:
    return [replace(line, is_right=True, is_dashed=True) for line in _joined(rows, name, "red", label)]


def _rewards(rows: Rows, names: list[str]) -> list[Line]:
    """A line for each of the first six reward functions."""
    return [
        line
        for name, colour in zip(names, PALETTE, strict=False)
        for line in _smooth(rows, name, colour, name.removeprefix("rewards/").removesuffix("/mean"))
    ]


def _layers(rows: Rows, prefix: str, colours: dict[str, str]) -> list[Line]:
    """Layers of a stack, from the bottom; what a row has no part of is 0 there."""
    there = [prefix + name for name in colours if any(row.get(prefix + name) is not None for row in rows)]
    if not there:
        return []
    some = [row for row in rows if any(row.get(name) is not None for name in there)]
    x, *layers = _values([dict.fromkeys(there, 0.0) | row for row in some], "step", *there)
    labels = [name.removeprefix(prefix) for name in there]
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


def _accuracy(rows: Rows) -> Panel:
    """Greedy and sampled pass@1 and, where the run asked for it, pass@k of the largest k."""
    ks = {int(name[13:]) for row in rows for name in row if name.startswith("heldout/pass@") and name[13:].isdigit()}
    names = [("pass@1", "blue", "greedy"), ("sampled_pass@1", "orange", "sampled")]
    names += [(f"pass@{max(ks)}", "green", f"one of {max(ks)} samples")] if ks - {1} else []
    lines = []
    for name, colour, label in names:
        x, y, low, high = _values(rows, "step", *(f"heldout/{name}{bound}" for bound in ("", "/low", "/high")))
        if len(x):
            line = Line(x=x.tolist(), y=y.tolist(), label=label, colour=colour, low=tuple(low), high=tuple(high))
            lines.append(line)
    return Panel(title="Held-out problems solved", unit="share, 95% interval", lines=lines, is_share=True)


def _lengths(rows: Rows) -> Panel:
    """Mean length with the band from the shortest to the longest, and the share that was cut on the right."""
    lines = _smooth(rows, "completions/mean_length", "blue", "mean, shortest to longest")
    x, low, high = _values(rows, "step", "completions/min_length", "completions/max_length")
    if lines and list(x) == lines[0].x:
        lines = [replace(lines[0], low=tuple(low), high=tuple(high))]
    lines += _right(rows, "completions/clipped_ratio", "cut off")
    return Panel(title="Length of completions", unit="tokens", lines=lines, right="share cut off")


def _reward_against_kl(rows: Rows, kl: str) -> Panel:
    """What was paid for the reward: each point is a step, the line goes through them in their order."""
    x, y = (running_mean(values) for values in _values(rows, kl, "reward"))
    line = Line(x=x.tolist(), y=y.tolist(), label="", colour="purple")
    unit = "nats an answer" if kl == "kl_sequence" else "nats a token"
    return Panel(
        title="Reward against KL, step by step",
        unit="mean raw reward, smoothed",
        x_label=f"KL from the reference, {unit}",
        lines=[line] if len(x) else [],
    )
