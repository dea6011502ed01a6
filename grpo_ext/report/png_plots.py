"""`curves.png`: the panels of `plot_data.py`, drawn by matplotlib from `metrics.jsonl` alone.

Dots are raw values, and lines are their running means over a tenth of the run. Bands are 95% intervals, or the range
from the shortest to the longest completion.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_ext.report.plot_data import MAX_MARKED_POINTS, PALETTE, Line, Panel, build_panels
from grpo_ext.report.run_files import CURVES_FILE, METRICS_FILE
from grpo_ext.report.run_reader import read_metrics

COLUMNS = 3
GREY = "#666666"


def draw_curves(output_dir: str | Path) -> Path:
    """Draw `output_dir/curves.png` and return its path; also works on a run that has not finished.

    Raises:
        ValueError: the folder has no metrics.
    """
    panels = build_panels(read_metrics(Path(output_dir) / METRICS_FILE))
    if not panels:
        raise ValueError(f"'{output_dir}' has no {METRICS_FILE} with a logged step.")
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3.5 * COLUMNS, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, panel in zip(cells, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    path = Path(output_dir) / CURVES_FILE
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x_label, fontsize=8.5, color=GREY)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=GREY)
    _style_axes(axes)
    if panel.x_label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.is_stacked:
        layers = [line.mean for line in panel.lines]
        colours = [PALETTE[line.colour] for line in panel.lines]
        axes.stackplot(panel.lines[0].x, layers, labels=[line.label for line in panel.lines], colors=colours, alpha=0.8)
        axes.margins(x=0)
    second = axes.twinx() if panel.right_label else axes
    for line in () if panel.is_stacked else panel.lines:
        _draw_line(second if line.on_right_axis else axes, line)
    if panel.is_share:
        axes.set_ylim(0, 1.02)
    elif not panel.is_stacked:
        axes.margins(y=0.12)
    if panel.right_label:
        second.set_ylabel(panel.right_label, fontsize=8.5, color=GREY)
        highest = max(max(line.y) for line in panel.lines if line.on_right_axis)
        second.set_ylim(0, max(1.02, 1.1 * highest))
        _style_axes(second)
    handles, labels = axes.get_legend_handles_labels()
    if panel.right_label:
        handles, labels = (a + b for a, b in zip((handles, labels), second.get_legend_handles_labels(), strict=True))
    if handles:
        legend = axes.legend(handles, labels, fontsize=7.5, handlelength=1.4, labelspacing=0.25, edgecolor="none")
        legend.get_frame().set_alpha(0.85 if panel.is_stacked else 0.0)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = PALETTE[line.colour]
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if line.mean:
        axes.plot(line.x, line.y, ".", color=colour, alpha=0.4, markersize=7, markeredgewidth=0)
        axes.plot(line.x, line.mean, color=colour, linewidth=1.8, label=line.label)
    else:
        is_few = len(line.x) <= MAX_MARKED_POINTS
        style = {"linestyle": "--"} if line.is_dashed else {"marker": "o" if is_few else "", "markersize": 3}
        axes.plot(line.x, line.y, color=colour, linewidth=1.5, label=line.label, **style)


def _style_axes(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=GREY)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
