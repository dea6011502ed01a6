"""Metrics files of two runs, compared."""

import json
from pathlib import Path

from grpo_ext.report.run_reader import read_metrics

# Of the log: what depends on the machine and on how busy it is.
TIMES = (
    "time/",
    "step_time",
    "peak_memory",
    "train_runtime",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "train_s",
)


def comparable(path: Path) -> list[str]:
    """The lines of a metrics file, sorted, without times; texts, so that null equals null."""
    rows = [
        {k: v for k, v in row.items() if not k.removeprefix("eval_").startswith(TIMES)} for row in read_metrics(path)
    ]
    return [json.dumps(row, sort_keys=True) for row in rows]
