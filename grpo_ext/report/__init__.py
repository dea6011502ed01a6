"""What a run leaves behind: `metrics.jsonl`, held-out accuracy with intervals, `curves.png`, `summary.json`, the card;
and what of it goes to the Hub."""
