"""`metrics.jsonl`: one JSON object a logged step, written line by line, readable while the run goes on.

{"step": 1, "reward": 0.42, "kl": 0.0, "frac_dead_groups": 0.06, "time/generate": 1.9, ...}
"""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.summary import SUMMARY_FILE

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to `output_dir/metrics.jsonl`.

    A fresh run starts a fresh file; a resumed one starts from the lines that its checkpoint knows, whatever was written
    after it. The summary of an earlier run in the same folder is not this one's, and goes.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = metrics_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(SUMMARY_FILE).unlink(missing_ok=True)
        new = path.with_name(f"{path.name}.new")  # a run that is killed here keeps the old lines
        new.write_text("".join(_line(row["step"], row) for row in state.log_history))
        new.replace(path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line with the step and what was logged, on the main process."""
        if state.is_world_process_zero and logs:
            append_metrics(args, state.global_step, logs)


def metrics_path(args: TrainingArguments) -> Path:
    """Where the metrics of a run with these arguments are."""
    assert args.output_dir is not None
    return Path(args.output_dir) / METRICS_FILE


def append_metrics(args: TrainingArguments, step: int, values: dict[str, Any]) -> None:
    """Add one line; numbers that JSON cannot hold (NaN, infinities) are written as null."""
    with metrics_path(args).open("a") as file:
        file.write(_line(step, values))


def _line(step: int, values: dict[str, Any]) -> str:
    row = {"step": step} | {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out, a missing file has no rows."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
