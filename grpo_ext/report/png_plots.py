"""`curves.png`: what happened in a run, drawn from `metrics.jsonl` alone.

Dots are raw values, lines their running mean over a tenth of the run, bands 95% intervals or the shortest and longest.
What is drawn, and in which order, is in `report/plot_data.py`.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_ext.report.metrics_file import METRICS_FILE, read_metrics
from grpo_ext.report.plot_data import FEW, PALETTE, Line, Panel, panels_of

CURVES_FILE = "curves.png"
COLUMNS = 3
GREY = "#666666"


def draw_curves(output_dir: str | Path) -> Path:
    """Draw `output_dir/curves.png` and return its path; works on a run that is still going or that died.

    Raises:
        ValueError: the folder has no metrics.
    """
    panels = panels_of(read_metrics(Path(output_dir) / METRICS_FILE))
    if not panels:
        raise ValueError(f"'{output_dir}' has no {METRICS_FILE} with a logged step.")
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3.5 * COLUMNS, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, panel in zip(cells, panels, strict=False):
        _draw(axes, panel)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    path = Path(output_dir) / CURVES_FILE
    figure.savefig(path, dpi=150)
    return path


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x_label, fontsize=8.5, color=GREY)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=GREY)
    _tidy(axes)
    if panel.x_label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.stacked:
        layers = [line.mean for line in panel.lines]
        colours = [PALETTE[line.colour] for line in panel.lines]
        axes.stackplot(panel.lines[0].x, layers, labels=[line.label for line in panel.lines], colors=colours, alpha=0.8)
        axes.margins(x=0)
    second = axes.twinx() if panel.right else axes
    for line in () if panel.stacked else panel.lines:
        _plot(second if line.is_right else axes, line)
    if panel.is_share:
        axes.set_ylim(0, 1.02)
    elif not panel.stacked:
        axes.margins(y=0.12)
    if panel.right:
        second.set_ylabel(panel.right, fontsize=8.5, color=GREY)
        highest = max(max(line.y) for line in panel.lines if line.is_right)
        second.set_ylim(0, max(1.02, 1.1 * highest))
        _tidy(second)
    handles, labels = axes.get_legend_handles_labels()
    if panel.right:
        handles, labels = (a + b for a, b in zip((handles, labels), second.get_legend_handles_labels(), strict=True))
    if handles:
        legend = axes.legend(handles, labels, fontsize=7.5, handlelength=1.4, labelspacing=0.25, edgecolor="none")
        legend.get_frame().set_alpha(0.85 if panel.stacked else 0.0)


def _plot(axes: Axes, line: Line) -> None:
    colour = PALETTE[line.colour]
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if line.mean:
        axes.plot(line.x, line.y, ".", color=colour, alpha=0.4, markersize=7, markeredgewidth=0)
        axes.plot(line.x, line.mean, color=colour, linewidth=1.8, label=line.label)
    else:
        is_few = len(line.x) <= FEW
        style = {"linestyle": "--"} if line.is_dashed else {"marker": "o" if is_few else "", "markersize": 3}
        axes.plot(line.x, line.y, color=colour, linewidth=1.5, label=line.label, **style)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=GREY)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
