"""Record held-out accuracy: rows of `heldout.jsonl`, and metrics.

    heldout.jsonl  {"step": 5, "right": [1, 0, ...], "right_lenient": [1, 1, ...], "shares": [...], "answers": [...]}
    metrics.jsonl  {"step": 5, "heldout/pass@1": 0.98, "heldout/pass@1/low": 0.95, "heldout/pass@1/high": 0.99}

A row of `heldout.jsonl` says for each problem whether it was solved, and whether it was if the format is ignored. It
has the greedy completions of the first four problems, which are the same in every row.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.evaluation.complete import Evaluation, Problem
from grpo_ext.evaluation.estimates import Estimate
from grpo_ext.report.display_text import final_answer_text, gold_answer, shorten, to_text
from grpo_ext.report.run_files import HELDOUT_FILE, keep_rows_until, read_rows, write_rows

SHOWN_PROBLEMS = 4


class HeldoutFile(TrainerCallback):
    """Starts `output_dir/heldout.jsonl`: empty, or with the rows up to the step that the run resumes from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, on the main process."""
        if state.is_world_process_zero:
            assert args.output_dir is not None
            keep_rows_until(Path(args.output_dir, HELDOUT_FILE), state.global_step)


def append_evaluation(output_dir: str, step: int, evaluation: Evaluation, problems: Sequence[Problem]) -> None:
    """Add the evaluation at this step to `heldout.jsonl`, in place of an earlier one at the same step."""
    answers = [
        {
            "prompt": shorten(to_text(problems[i]["prompt"])),
            "gold": gold_answer(problems[i]),
            "text": shorten(to_text(evaluation.completions[i])),
            "found": final_answer_text(to_text(evaluation.completions[i])),
            "right": evaluation.right[i],
        }
        for i in range(min(SHOWN_PROBLEMS, len(problems)))
    ]
    row = {
        "step": step,
        "problems_digest": evaluation.problems_digest,
        "right": [int(hit) for hit in evaluation.right],
        "right_lenient": [int(hit) for hit in evaluation.right_lenient],
        "shares": [round(share, 4) for share in evaluation.shares],
        "pass_at": {str(k): asdict(estimate) for k, estimate in evaluation.pass_at.items()},
        "kinds": {
            column: {value: asdict(estimate) for value, estimate in values.items()}
            for column, values in evaluation.kinds.items()
        },
        "answers": answers,
    }
    path = Path(output_dir, HELDOUT_FILE)
    write_rows(path, [*(old for old in read_rows(path) if old["step"] != step), row])


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation under their names in `metrics.jsonl`."""
    named: list[tuple[str, Estimate | None]] = [("pass@1", evaluation.greedy), ("sampled_pass@1", evaluation.sampled)]
    named += [("lenient_pass@1", evaluation.lenient), ("lenient_sampled_pass@1", evaluation.lenient_sampled)]
    named += [(f"pass@{k}", estimate) for k, estimate in evaluation.pass_at.items()]
    metrics: dict[str, float] = {}
    for name, estimate in named:
        if estimate is not None:
            figures = asdict(estimate)
            metrics[f"heldout/{name}"] = figures.pop("value")
            metrics |= {f"heldout/{name}/{bound}": figures[bound] for bound in ("low", "high")}
    return metrics
