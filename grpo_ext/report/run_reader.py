"""What a run found, in sentences and tables: from the files in its folder, whether it ended, goes on, or died."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ext.evaluation.callback import HELDOUT_FILE
from grpo_ext.evaluation.estimates import Difference, Estimate
from grpo_ext.report.jsonl import Row, read_lines
from grpo_ext.report.metrics_file import METRICS_FILE, read_metrics
from grpo_ext.report.run_settings import SETTINGS_FILE

# Metrics of rewards in worker processes, means of a rollout and a process: name at the end -> what it counts.
FAILURES = {
    "timeouts": "answers over the time limit of a reward",
    "crashes": "answers that ended the process of a reward",
    "errors": "answers on which a reward raised an error",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has left in its folder so far.

    Attributes:
        rows: of `metrics.jsonl`.
        evaluations: of `heldout.jsonl`, by step; empty where nothing was held out.
        settings: `run.json`; empty where there is none.
    """

    folder: Path
    rows: list[Row]
    evaluations: list[Row]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """The run in this folder.

        Raises:
            ValueError: there is none.
        """
        folder = Path(folder)
        rows = read_metrics(folder / METRICS_FILE)
        if not rows:
            raise ValueError(
                f"'{folder}' has no {METRICS_FILE} with a logged step. Give the output_dir of a run, for example "
                f"outputs/math."
            )
        settings = folder / SETTINGS_FILE
        by_step = {row["step"]: row for row in read_lines(folder / HELDOUT_FILE)}
        return cls(
            folder=folder,
            rows=rows,
            evaluations=[by_step[step] for step in sorted(by_step)],
            settings=json.loads(settings.read_text()) if settings.exists() else {},
        )

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max(row["step"] for row in self.rows)

    def last(self, metric: str) -> float | None:
        """The last value that was logged of a metric."""
        return next((row[metric] for row in reversed(self.rows) if row.get(metric) is not None), None)


def change(run: Run, column: str = "right") -> tuple[Estimate, Estimate, Difference] | None:
    """The first evaluation, the last one, and what changed between them on the same problems; None where there are not
    two. `column` is "right" for greedy answers, "shares" for sampled ones."""
    measured = [row for row in run.evaluations if row.get(column)]
    if len(measured) < 2 or len(measured[0][column]) != len(measured[-1][column]):
        return None
    before, after = measured[0][column], measured[-1][column]
    return Estimate.of(before), Estimate.of(after), Difference.of(before, after)


def verdict(run: Run) -> str:
    """The run in one sentence."""
    found = change(run)
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
    return f"No change that could be told from chance: {figures} ({interval})."


def _without_change(run: Run) -> str:
    if run.evaluations:
        before = Estimate.of(run.evaluations[0]["right"])
        since = "No evaluation since" if len(run.evaluations) == 1 else "Later evaluations are of other problems"
        return (
            f"Before training: {_percent(before.value)} of {before.n} held-out problems "
            f"(95% interval {_percent(before.low)} to {_percent(before.high)}). {since}."
        )
    rewards = [row["reward"] for row in run.rows if row.get("reward") is not None]
    if not rewards:
        return "Nothing was logged yet."
    return (
        f"Nothing was held out, so what it learned is not measured. Mean reward of the training prompts: "
        f"{rewards[0]:.2f} at first, {rewards[-1]:.2f} at last."
    )


def status(run: Run) -> list[str]:
    """Where the run is, and on what."""
    planned, seconds, seed = run.settings.get("steps"), run.last("train_runtime"), setting(run, "seed")
    parts = [
        f"step {run.step:,}" + (f" of {planned:,}" if planned else ""),
        f"{seconds:,.0f} s of training" if seconds else "",
        run.settings.get("base_model", ""),
        run.settings.get("device", ""),
        "" if seed is None else f"seed {seed}",
    ]
    return [part for part in parts if part]


def setting(run: Run, name: str) -> Any:
    """A field of the trainer's arguments; None where it is not recorded."""
    return run.settings.get("settings", {}).get(name)


def results(run: Run) -> dict[str, list[str]]:
    """How accuracy was measured -> before, after, and the change; empty where it is not counted problem by problem."""
    table = {}
    for label, column in (("greedy pass@1", "right"), ("sampled pass@1", "shares")):
        found = change(run, column)
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


def reliability(run: Run) -> dict[str, int]:
    """How often something went wrong and the run went on: failures of rewards, and updates that were skipped."""
    counts = {}
    a_step = (setting(run, "gradient_accumulation_steps") or 1) / (
        (setting(run, "steps_per_generation") or 1) * (setting(run, "num_iterations") or 1)
    )
    processes = run.settings.get("processes", 1)
    for ending, label in FAILURES.items():
        rows = [row for row in run.rows if any(_counts(name, ending) for name in row)]
        steps = [row["step"] for row in rows]
        since = [step - before for before, step in zip([0, *steps], steps, strict=False)]
        totals = [sum(value or 0 for name, value in row.items() if _counts(name, ending)) for row in rows]
        if rows:
            counts[label] = round(sum(a * b for a, b in zip(totals, since, strict=True)) * a_step * processes)
    skipped = run.last("nonfinite/skipped")
    if skipped is not None:
        counts["updates skipped because of numbers that are not finite"] = round(skipped)
    return counts


def provenance(run: Run) -> dict[str, str]:
    """What the run was made with: the model, the machine, versions, and the settings that are not at their defaults."""
    recorded = run.settings
    if not recorded:
        return {}
    total, trained = recorded["total_parameters"], recorded["trainable_parameters"]
    return {
        "model": f"{recorded['base_model']}, {total:,} parameters, {trained:,} of them trained",
        "device": recorded["device"] + (f", {recorded['processes']} processes" if recorded["processes"] > 1 else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in recorded["versions"].items()),
        **{f"adapter: {name}": written(value) for name, value in recorded["adapter"].items()},
        **{name: written(recorded["settings"][name]) for name in recorded["changed"]},
    }


def written(value: Any) -> str:
    """A setting in plain words: `down_proj, up_proj`."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {written(item)}" for name, item in value.items())
    return ", ".join(map(written, value)) if isinstance(value, list) else str(value)


def _counts(name: str, ending: str) -> bool:
    return name.startswith("rewards/") and name.endswith(f"/{ending}")


def _percent(share: float) -> str:
    """`14%`; and 99.6% rather than 100% where not all is right."""
    text = f"{share * 100:.0f}%"
    return f"{share * 100:.1f}%" if text in ("0%", "100%") and 0 < share < 1 else text
