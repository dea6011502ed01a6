"""Compares several runs: their curves in shared panels, their outcomes, and the settings that differ."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grpo_ext.report.plot_data import PALETTE, Line, Panel, build_panels
from grpo_ext.report.run_reader import RunRecord, accuracy_table, format_setting

PER_RUN_SETTINGS = ("output_dir", "logging_dir", "run_name", "hub_model_id")  # differ in any two runs


def overlay_panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """Every panel once, with one line per run: the first line, the sum of the layers, or the share of mixed groups."""
    colours = list(PALETTE)
    panels: dict[str, Panel] = {}
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        for panel in build_panels(run.rows):
            line = replace(_main_line(panel), label=name, colour=colours[i % len(colours)], is_dashed=i >= len(colours))
            before = panels.get(panel.title, replace(panel, lines=[], right_label="", is_stacked=False))
            panels[panel.title] = replace(before, lines=[*before.lines, line])
    return [replace(panel, title=_overlay_title(panel)) for panel in panels.values()]


def _main_line(panel: Panel) -> Line:
    if not panel.is_stacked:
        line = next((line for line in panel.lines if line.label == "mean size"), panel.lines[0])
        return replace(line, low=(), high=()) if line.mean else line
    parts = [line for line in panel.lines if line.label == "mixed"] or panel.lines
    total, mean = (np.sum(values, axis=0) for values in zip(*((line.y, line.mean) for line in parts), strict=True))
    return replace(parts[0], y=total.tolist(), mean=tuple(mean))


def _overlay_title(panel: Panel) -> str:
    """The title of a panel of which only one line is left."""
    return {
        "Held-out problems solved": "Held-out problems solved (greedy)",
        "Groups by their rewards": "Groups whose rewards differ",
        "Mean normalised reward": "Mean size of the normalised reward",
    }.get(panel.title, panel.title)


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """A different name for each run: the name of its folder, with the parent folder or a number if names repeat."""
    names = [run.name for run in runs]
    if len(set(names)) < len(runs):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    if len(set(names)) < len(runs):
        names = [f"{i} {name}" for i, name in enumerate(names, start=1)]
    return names


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings, versions and other records that differ between runs: name -> one value per run, "" if it has none."""
    flat = [_flatten(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    table = {name: [settings.get(name, "") for settings in flat] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def _flatten(settings: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for part, values in settings.items():
        if part == "changed":
            continue
        inner = values if isinstance(values, dict) else {"": values}
        prefix = "" if part == "settings" else part
        for name, value in inner.items():
            if name not in PER_RUN_SETTINGS:
                flat[f"{prefix} {name}".strip()] = format_setting(value)
    return flat


def outcome_table(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The outcome of each run: name -> one value per run, "" if it was not measured."""
    tables = [accuracy_table(run) for run in runs]
    table = {"steps": [f"{run.step:,}" for run in runs]}
    for name in dict.fromkeys(name for results_of in tables for name in results_of):
        for place, part in enumerate(("before", "after", "change")):
            values = [results_of[name][place] if name in results_of else "" for results_of in tables]
            if any(values):
                table[f"{name}, {part}"] = values
    for label, metric, form in (
        ("last mean reward", "reward", "{:.2f}"),
        ("last KL, nats per token", "kl", "{:.3g}"),
        ("training time, s", "train_runtime", "{:,.0f}"),
        ("peak memory, MB", "peak_memory_mb", "{:,.0f}"),
    ):
        last = [run.last(metric) for run in runs]
        if any(value is not None for value in last):
            table[label] = ["" if value is None else form.format(value) for value in last]
    return table
