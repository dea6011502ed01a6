"""Held-out accuracy while a run goes on: at step 0, every `eval_steps` and at the end, in the metrics and on the bar.

    metrics.jsonl  {"step": 5, "heldout/pass@1": 0.98, "heldout/pass@1/low": 0.95, "heldout/pass@1/high": 0.99}
    heldout.jsonl  {"step": 5, "right": [1, 0, ...], "shares": [...], "kinds": {...}, "answers": [{"text": ...}, ...]}

The second has what the report needs beside: of each problem whether it was solved, and the greedy answers to the first
four, the same ones every time.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.evaluation.complete import Evaluation, Problem
from grpo_ext.evaluation.estimates import Estimate
from grpo_ext.report.display_text import clipped, found_in, gold_of, readable
from grpo_ext.report.jsonl import append_line, keep_lines

BEFORE_FILE, HELDOUT_FILE = "heldout_before.json", "heldout.jsonl"
SHOWN_PROBLEMS = 4


class HeldOutAccuracy(TrainerCallback):
    """Records held-out accuracy: what was found before training, then every `eval_steps` steps.

    Args:
        before: the evaluation of the starting policy; recorded as step 0, unless the run resumes.
        measure: evaluates the policy as it is now.
        record: takes an evaluation, at the step that it belongs to.
    """

    def __init__(
        self,
        before: Evaluation,
        measure: Callable[[], Evaluation],
        record: Callable[[Evaluation], None],
    ) -> None:
        self._before = before
        self._measure = measure
        self._record = record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            assert args.output_dir is not None
            keep_lines(Path(args.output_dir, HELDOUT_FILE), state.global_step)
        if state.global_step == 0:
            self._record(self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps  # measured after training, with samples
        if args.eval_steps and state.global_step % args.eval_steps == 0 and not is_last:
            self._record(self._measure())


def append_evaluation(output_dir: str, step: int, evaluation: Evaluation, problems: Sequence[Problem]) -> None:
    """Add what one evaluation found at this step to `heldout.jsonl`."""
    answers = [
        {
            "prompt": clipped(readable(problems[i]["prompt"])),
            "gold": gold_of(problems[i]),
            "text": clipped(readable(evaluation.completions[i])),
            "found": found_in(readable(evaluation.completions[i])),
            "right": evaluation.right[i],
        }
        for i in range(min(SHOWN_PROBLEMS, len(problems)))
    ]
    row = {
        "step": step,
        "right": [int(hit) for hit in evaluation.right],
        "shares": [round(share, 4) for share in evaluation.shares],
        "pass_at": {str(k): asdict(estimate) for k, estimate in evaluation.pass_at.items()},
        "kinds": {
            column: {value: asdict(estimate) for value, estimate in values.items()}
            for column, values in evaluation.kinds.items()
        },
        "answers": answers,
    }
    append_line(Path(output_dir, HELDOUT_FILE), row)


def as_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation under the names that they have in `metrics.jsonl`."""
    named: list[tuple[str, Estimate | None]] = [("pass@1", evaluation.greedy), ("sampled_pass@1", evaluation.sampled)]
    named += [(f"pass@{k}", estimate) for k, estimate in evaluation.pass_at.items()]
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
    figures: dict[str, Any] = {
        name: kept[name] and Estimate(**kept[name]) for name in ("greedy", "sampled", "pass_at_k")
    }
    figures["pass_at"] = {int(k): Estimate(**estimate) for k, estimate in kept["pass_at"].items()}
    figures["kinds"] = {
        column: {value: Estimate(**estimate) for value, estimate in values.items()}
        for column, values in kept["kinds"].items()
    }
    evaluation = Evaluation(**kept | figures)
    return evaluation if (evaluation.greedy.n, evaluation.k) == (problems, samples) else None
