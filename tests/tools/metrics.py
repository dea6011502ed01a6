"""Compare the metrics files of two runs."""

import json
from pathlib import Path

from grpo_ext.report.run_reader import read_metrics

# Logged values that depend on the machine and on its load.
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
    """The lines of a metrics file, with sorted keys and without times; as text, so that null equals null."""
    rows = [
        {k: v for k, v in row.items() if not k.removeprefix("eval_").startswith(TIMES)} for row in read_metrics(path)
    ]
    return [json.dumps(row, sort_keys=True) for row in rows]
