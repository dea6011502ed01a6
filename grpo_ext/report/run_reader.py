"""Read the files of a run that ended, is still going, or died, and give its results as sentences and tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ext.evaluation.estimates import Difference, Estimate
from grpo_ext.report.run_files import HELDOUT_FILE, METRICS_FILE, SETTINGS_FILE, Row, read_rows

# Metrics of rewards in worker processes, each a mean per rollout and process: last part of the name -> label.
FAILURE_LABELS = {
    "timeouts": "completions over the time limit of a reward",
    "crashes": "completions that crashed the worker of a reward",
    "errors": "completions on which a reward raised an error",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The current contents of a run's folder.

    Attributes:
        folder: the folder.
        rows: the rows of `metrics.jsonl`.
        evaluations: the rows of `heldout.jsonl`, one per step; empty if nothing was held out.
        settings: the contents of `run.json`; empty if there is no such file.
    """

    folder: Path
    rows: list[Row]
    evaluations: list[Row]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecord":
        """Read the run in this folder.

        Raises:
            ValueError: there is no run in it.
        """
        folder = Path(folder)
        rows = read_metrics(folder / METRICS_FILE)
        if not rows:
            raise ValueError(
                f"'{folder}' has no {METRICS_FILE} with a logged step. Give the output_dir of a run, for example "
                f"outputs/math."
            )
        settings = folder / SETTINGS_FILE
        by_step = {row["step"]: row for row in read_rows(folder / HELDOUT_FILE)}
        return cls(
            folder=folder,
            rows=rows,
            evaluations=[by_step[step] for step in sorted(by_step)],
            settings=json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {},
        )

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last logged step."""
        return max(row["step"] for row in self.rows)

    def last(self, metric: str) -> float | None:
        """The last logged value of a metric; None if it was never logged."""
        return next((row[metric] for row in reversed(self.rows) if row.get(metric) is not None), None)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file, without a last line that a kill cut short; none if there is no file."""
    return list(read_rows(path))


def accuracy_change(run: RunRecord, column: str = "right") -> tuple[Estimate, Estimate, Difference] | None:
    """The first and the last evaluation, and the change between them; None if there are no two on the same problems.

    Args:
        column: "right" for greedy completions, "shares" for sampled ones.
    """
    measured = [row for row in run.evaluations if row.get(column)]
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    before, after = first[column], last[column]
    if first.get("problems_digest") != last.get("problems_digest") or len(before) != len(after):
        return None
    return Estimate.of(before), Estimate.of(after), Difference.of(before, after)


def verdict(run: RunRecord) -> str:
    """The run in one sentence."""
    found = accuracy_change(run)
    if found is None:
        return _without_change(run)
    before, after, difference = found
    figures = f"from {_percent(before.value)} to {_percent(after.value)} of {difference.n} held-out problems"
    points, low, high = (f"{share * 100:+.0f}" for share in (difference.value, difference.low, difference.high))
    interval = f"{points} points, 95% interval {low} to {high}"
    is_sure = difference.p_value is not None and difference.p_value < 0.05
    if is_sure and difference.low > 0:
        return f"It learned: {figures} ({interval})."
    if is_sure and difference.high < 0:
        return f"It got worse: {figures} ({interval})."
    return f"No change beyond chance: {figures} ({interval})."


def _without_change(run: RunRecord) -> str:
    if run.evaluations:
        before = Estimate.of(run.evaluations[0]["right"])
        since = "No evaluation since then" if len(run.evaluations) == 1 else "Later evaluations are on other problems"
        return (
            f"Before training: {_percent(before.value)} of {before.n} held-out problems "
            f"(95% interval {_percent(before.low)} to {_percent(before.high)}). {since}."
        )
    rewards = [row["reward"] for row in run.rows if row.get("reward") is not None]
    if not rewards:
        return "Nothing was logged yet."
    return (
        f"Nothing was held out, so it is unknown whether it learned. Mean reward on the training prompts: "
        f"{rewards[0]:.2f} at the start, {rewards[-1]:.2f} at the end."
    )


def run_status(run: RunRecord) -> list[str]:
    """Step, duration, model, device and seed, if they are known."""
    planned, seconds, seed = run.settings.get("steps"), run.last("train_runtime"), training_argument(run, "seed")
    parts = [
        f"step {run.step:,}" + (f" of {planned:,}" if planned else ""),
        f"{seconds:,.0f} s of training" if seconds else "",
        run.settings.get("base_model", ""),
        run.settings.get("device", ""),
        "" if seed is None else f"seed {seed}",
    ]
    return [part for part in parts if part]


def training_argument(run: RunRecord, name: str) -> Any:
    """A field of the trainer's arguments; None if it is not recorded."""
    return run.settings.get("settings", {}).get(name)


def accuracy_table(run: RunRecord) -> dict[str, list[str]]:
    """Measure -> estimate before, estimate after, and their change, which is "" for pass@k and kinds of problems."""
    table = {}
    columns = {"greedy pass@1": "right", "greedy pass@1, any format": "right_lenient", "sampled pass@1": "shares"}
    for label, column in columns.items():
        found = accuracy_change(run, column)
        if found:
            table[label] = [str(part) for part in found]
    first, last = (run.evaluations[i] if run.evaluations else {} for i in (0, -1))
    for k, before in first.get("pass_at", {}).items():
        after = last["pass_at"].get(k)
        table[f"pass@{k}"] = [str(Estimate(**before)), str(Estimate(**after)) if after else "", ""]
    for column, values in first.get("kinds", {}).items():
        for value, before in values.items():
            after = last["kinds"].get(column, {}).get(value)
            label = f"{column} {value}, greedy (n = {before['n']})"
            table[label] = [str(Estimate(**before)), str(Estimate(**after)) if after else "", ""]
    return table


def failure_counts(run: RunRecord) -> dict[str, int]:
    """How many failures the run survived: failed rewards and skipped updates, label -> count."""
    counts = {}
    rollouts_per_step = (training_argument(run, "gradient_accumulation_steps") or 1) / (
        (training_argument(run, "steps_per_generation") or 1) * (training_argument(run, "num_iterations") or 1)
    )
    processes = run.settings.get("processes", 1)
    for ending, label in FAILURE_LABELS.items():
        rows = [row for row in run.rows if any(_counts_failures(name, ending) for name in row)]
        steps = [row["step"] for row in rows]
        since = [step - before for before, step in zip([0, *steps], steps, strict=False)]
        totals = [sum(value or 0 for name, value in row.items() if _counts_failures(name, ending)) for row in rows]
        if rows:
            rollouts = rollouts_per_step * processes
            counts[label] = round(sum(a * b for a, b in zip(totals, since, strict=True)) * rollouts)
    skipped = run.last("nonfinite/skipped")
    if skipped is not None:
        counts["updates skipped because the loss or a gradient was not finite"] = round(skipped)
    return counts


def provenance(run: RunRecord) -> dict[str, str]:
    """Model, device, versions, adapter, and the settings that differ from their defaults, label -> text."""
    recorded = run.settings
    if not recorded:
        return {}
    total, trained = recorded["total_parameters"], recorded["trainable_parameters"]
    return {
        "model": f"{recorded['base_model']}, {total:,} parameters, {trained:,} of them trained",
        "device": recorded["device"] + (f", {recorded['processes']} processes" if recorded["processes"] > 1 else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in recorded["versions"].items()),
        **{f"adapter: {name}": format_setting(value) for name, value in recorded["adapter"].items()},
        **{name: format_setting(recorded["settings"][name]) for name in recorded["changed"]},
    }


def format_setting(value: Any) -> str:
    """A setting as text: `down_proj, up_proj`."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {format_setting(item)}" for name, item in value.items())
    return ", ".join(map(format_setting, value)) if isinstance(value, list) else str(value)


def _counts_failures(name: str, ending: str) -> bool:
    return name.startswith("rewards/") and name.endswith(f"/{ending}")


def _percent(share: float) -> str:
    """`14%`; but 99.6% instead of 100% unless every problem is right, and likewise for 0%."""
    text = f"{share * 100:.0f}%"
    return f"{share * 100:.1f}%" if text in ("0%", "100%") and 0 < share < 1 else text
