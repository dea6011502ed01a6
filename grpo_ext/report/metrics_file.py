"""Write `metrics.jsonl`: one JSON object per logged step, readable during the run.

{"step": 1, "reward": 0.42, "kl": 0.0, "frac_dead_groups": 0.06, "time/generate": 1.9, ...}
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.run_files import METRICS_FILE, SUMMARY_FILE, Row, append_row, write_rows


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to `output_dir/metrics.jsonl`.

    A new run starts an empty file. A resumed run keeps the rows up to its checkpoint, and drops those written after it.
    The `summary.json` of an earlier run in the same folder is deleted.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, on the main process."""
        if not state.is_world_process_zero:
            return
        path = metrics_path(args)
        path.with_name(SUMMARY_FILE).unlink(missing_ok=True)
        write_rows(path, (_metrics_row(row["step"], row) for row in state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one row with the step and the logged values, on the main process."""
        if state.is_world_process_zero and logs:
            append_metrics(args, state.global_step, logs)


def metrics_path(args: TrainingArguments) -> Path:
    """The metrics file of a run with these arguments."""
    assert args.output_dir is not None
    return Path(args.output_dir) / METRICS_FILE


def append_metrics(args: TrainingArguments, step: int, values: dict[str, Any]) -> None:
    """Add one row; numbers that JSON cannot hold (NaN, infinities) are written as null."""
    append_row(metrics_path(args), _metrics_row(step, values))


def _metrics_row(step: int, values: dict[str, Any]) -> Row:
    return {"step": step} | {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
