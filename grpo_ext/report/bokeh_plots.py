"""The panels of a run as Bokeh figures: the browser draws them, and shows their values under the pointer.

In: panels of `plot_data.py`. Out: JSON for `Bokeh.embed.embed_item`, and the legend of each figure.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    HoverTool,
    LinearAxis,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from grpo_ext.report.plot_data import MAX_MARKED_POINTS, PALETTE, Line, Panel

HEIGHT = 210  # pixels
# Colour on a light background -> colour on a dark one, if they differ: text, grid, and the palette's blue.
TEXT_COLOUR, GRID_COLOUR = "#5c646d", "#dfe2e5"
DARK_COLOURS = {TEXT_COLOUR: "#9aa4ae", GRID_COLOUR: "#31373d", PALETTE["blue"]: "#3d9be0"}


@dataclass(frozen=True, kw_only=True)
class BokehPanel:
    """A panel in the form that `page.js` reads; the field names are the keys of its JSON.

    Attributes:
        title: title of the panel.
        x_label: label of the x axis.
        item: the figure as Bokeh's JSON.
        lines: for each line, its label, its colour (a name of `PALETTE`), and whether it is dashed.
        x: the steps with values; empty if x is not the step.
        values: for each line, the text of its value at each of these steps; "" if it has no value there.
    """

    title: str
    x_label: str
    item: dict[str, Any]
    lines: list[dict[str, Any]]
    x: list[float]
    values: list[list[str]]


@cache
def bokeh_js() -> str:
    """The JavaScript that draws the figures."""
    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def to_bokeh(panel: Panel) -> BokehPanel:
    """The Bokeh figure of a panel."""
    steps = sorted({x for line in panel.lines for x in line.x}) if panel.x_label == "step" else []
    values = [_value_texts(line, steps, has_band=not panel.is_stacked) for line in panel.lines]
    return BokehPanel(
        title=panel.title,
        x_label=panel.x_label,
        item=_round_floats(json_item(_figure(panel, steps, values))),
        lines=[{"label": line.label, "colour": line.colour, "dashed": line.is_dashed} for line in panel.lines],
        x=steps,
        values=values,
    )


def _figure(panel: Panel, steps: list[float], values: list[list[str]]) -> figure:
    is_by_step = panel.x_label == "step"
    plot = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_range=DataRange1d(range_padding=0.02),
        x_axis_label=panel.x_label,
        y_axis_label=panel.unit,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
    )
    if panel.is_share:
        plot.y_range = Range1d(start=0, end=1.02)
    if panel.right_label:
        highest = max(max(line.y) for line in panel.lines if line.on_right_axis)
        plot.extra_y_ranges = {"right": Range1d(start=0, end=max(1.02, 1.1 * highest))}
        plot.add_layout(LinearAxis(y_range_name="right", axis_label=panel.right_label), "right")
    if panel.is_stacked:
        _draw_layers(plot, panel.lines)
    for line in () if panel.is_stacked else panel.lines:
        _draw_line(plot, line)
    _style_axes(plot, is_by_step=is_by_step)
    if is_by_step:
        _add_step_hover(plot, panel, steps, values)
    else:
        _add_point_hover(plot, panel)
    return plot


def _draw_layers(plot: figure, lines: list[Line]) -> None:
    """Draw the running means as stacked layers."""
    floor = np.zeros(len(lines[0].x))
    for line in lines:
        top = floor + np.array(line.mean)
        source = ColumnDataSource({"x": line.x, "low": floor.tolist(), "high": top.tolist()})
        plot.varea("x", "low", "high", source=source, color=PALETTE[line.colour], alpha=0.85)
        floor = top


def _draw_line(plot: figure, line: Line) -> None:
    colour = PALETTE[line.colour]
    columns: dict[str, Any] = {"x": line.x, "y": line.y, "mean": line.mean, "low": line.low, "high": line.high}
    source = ColumnDataSource({name: list(column) for name, column in columns.items() if column})
    style: dict[str, Any] = {"source": source, "color": colour, **_axis_options(line)}
    if line.low:
        plot.varea("x", "low", "high", alpha=0.16, **style)
    if line.mean:
        plot.scatter("x", "y", size=5, alpha=0.4, line_color=None, **{**style, "color": None, "fill_color": colour})
    elif len(line.x) <= MAX_MARKED_POINTS and not line.is_dashed:
        plot.scatter("x", "y", size=5, **style)
    plot.line("x", "mean" if line.mean else "y", line_width=2, line_dash=[5, 4] if line.is_dashed else "solid", **style)


def _add_step_hover(plot: figure, panel: Panel, steps: list[float], values: list[list[str]]) -> None:
    """Show the values of all lines at the step under the pointer."""
    main = max(panel.lines, key=lambda line: len(line.x))
    heights = np.interp(steps, main.x, main.mean or main.y).tolist()
    columns = {f"line{i}": [text or "-" for text in texts] for i, texts in enumerate(values)}
    source = ColumnDataSource({"x": steps, "y": heights, **columns})
    glyph = plot.line if len(steps) > 1 else partial(plot.scatter, size=20)  # a line of one point has no length
    invisible = glyph("x", "y", source=source, alpha=0, **_axis_options(main))
    named = [(line.label or panel.unit, f"@line{i}") for i, line in enumerate(panel.lines)]
    plot.add_tools(
        HoverTool(
            renderers=[invisible],
            mode="vline",
            tooltips=[("step", "@x{0,0}"), *named],
            attachment="horizontal",
        ),
        CrosshairTool(dimensions="height", line_color=TEXT_COLOUR),
    )


def _add_point_hover(plot: figure, panel: Panel) -> None:
    """Show the coordinates of the point under the pointer."""
    for line in panel.lines:
        invisible = plot.scatter(line.x, line.y, size=8, alpha=0)
        named = [(panel.x_label, "@x{0.000}"), (line.label or panel.unit, "@y{0.000}")]
        plot.add_tools(HoverTool(renderers=[invisible], tooltips=named, attachment="horizontal"))


def _axis_options(line: Line) -> dict[str, Any]:
    return {"y_range_name": "right"} if line.on_right_axis else {}


def _style_axes(plot: figure, *, is_by_step: bool) -> None:
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_color = GRID_COLOUR
    for axis in plot.axis:
        axis.axis_line_color = axis.major_tick_line_color = GRID_COLOUR
        axis.minor_tick_line_color = None
        axis.major_label_text_color = axis.axis_label_text_color = TEXT_COLOUR
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "11px"
        axis.axis_label_standoff = 4
        axis.ticker = BasicTicker(desired_num_ticks=5)
    if is_by_step:
        plot.xaxis.ticker = BasicTicker(desired_num_ticks=5, min_interval=1)
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")


def _value_texts(line: Line, steps: list[float], *, has_band: bool) -> list[str]:
    """The values of a line at these steps, with their band; "" for a step without a value."""
    bands = zip(line.low, line.high, strict=True) if line.low and has_band else [None] * len(line.x)
    texts = {
        x: format_number(y) + (f" [{format_number(band[0])}, {format_number(band[1])}]" if band else "")
        for x, y, band in zip(line.x, line.y, bands, strict=True)
    }
    return [texts.get(step, "") for step in steps]


def format_number(number: float) -> str:
    """The number with few digits: 0.375, 12.3, 1,234, 1.2e-05."""
    if number and abs(number) < 1e-3:
        return f"{number:.1e}"
    digits = 3 - len(str(int(abs(number)))) if abs(number) >= 1 else 3
    return f"{round(number, digits):,.{max(0, digits)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{number:,.0f}"


def _round_floats(value: Any) -> Any:
    """The same data with floats rounded to five digits, which makes the page smaller."""
    if isinstance(value, dict):
        return {name: _round_floats(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round_floats(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.5g}")
    return value
