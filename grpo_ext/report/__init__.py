"""What a run leaves behind: `metrics.jsonl`, held-out accuracy with intervals, `curves.png`, `summary.json`."""
