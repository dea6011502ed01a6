"""`metrics.jsonl`: one JSON object a logged step, written line by line, readable while the run goes on.

{"step": 1, "reward": 0.42, "kl": 0.0, "frac_dead_groups": 0.06, "time/generate": 1.9, ...}
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.jsonl import append_line, read_lines, write_lines
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
        """Begin the file."""
        if not state.is_world_process_zero:
            return
        path = metrics_path(args)
        path.with_name(SUMMARY_FILE).unlink(missing_ok=True)
        write_lines(path, (_row(row["step"], row) for row in state.log_history))

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
    append_line(metrics_path(args), _row(step, values))


def _row(step: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"step": step} | {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out, a missing file has no rows."""
    return list(read_lines(path))
