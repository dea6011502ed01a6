"""Held-out accuracy while a run goes on: a point at step 0 and one every `eval_steps`, in the metrics and on the bar.

{"step": 5, "heldout/pass@1": 0.98, "heldout/pass@1/low": 0.95, "heldout/pass@1/high": 0.99}
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.evaluation import Estimate, Evaluation

BEFORE_FILE = "heldout_before.json"


class HeldOutAccuracy(TrainerCallback):
    """Logs held-out accuracy with its interval: what was found before training, then every `eval_steps` steps.

    Args:
        before: the evaluation of the starting policy; logged as step 0, unless the run resumes.
        measure: evaluates the policy as it is now.
        log: takes the metrics, for example `GRPOExtTrainer.log_alone`.
    """

    def __init__(
        self, before: Evaluation, measure: Callable[[], Evaluation], log: Callable[[dict[str, float]], None]
    ) -> None:
        self._before = before
        self._measure = measure
        self._log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._log(as_metrics(self._before))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps  # measured after training, with samples
        if args.eval_steps and state.global_step % args.eval_steps == 0 and not is_last:
            self._log(as_metrics(self._measure()))


def as_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation under the names that they have in `metrics.jsonl`."""
    named = [
        ("pass@1", evaluation.greedy),
        ("sampled_pass@1", evaluation.sampled),
        (f"pass@{evaluation.k}", evaluation.pass_at_k),
    ]
    metrics: dict[str, float] = {}
    for name, estimate in named:
        if estimate is not None:
            figures = asdict(estimate)
            metrics[f"heldout/{name}"] = figures.pop("value")
            metrics |= {f"heldout/{name}/{bound}": figures[bound] for bound in ("low", "high")}
    return metrics


def save_before(output_dir: str | Path, evaluation: Evaluation) -> None:
    """Keep what was found before training, for sessions that resume the run."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, BEFORE_FILE).write_text(json.dumps(asdict(evaluation)) + "\n")


def load_before(output_dir: str | Path, *, problems: int, samples: int) -> Evaluation | None:
    """What `save_before` kept; None where it is not there, or of another number of problems or samples."""
    try:
        kept = json.loads(Path(output_dir, BEFORE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # killed before it was written
        return None
    estimates = {name: kept[name] and Estimate(**kept[name]) for name in ("greedy", "sampled", "pass_at_k")}
    evaluation = Evaluation(**kept | estimates)
    return evaluation if (evaluation.greedy.n, evaluation.k) == (problems, samples) else None
