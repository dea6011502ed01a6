"""Evaluate a run every few steps, and keep the evaluation from before training for sessions that resume the run.

Recording the results is left to the caller.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.evaluation.complete import Evaluation, Problem, digest_of
from grpo_ext.evaluation.estimates import Estimate

INITIAL_FILE = "heldout_before.json"


class HeldOutAccuracy(TrainerCallback):
    """Records held-out accuracy: that of the starting policy as step 0, then a new evaluation every `eval_steps` steps.

    Args:
        before: the evaluation of the starting policy; not recorded if the run resumes.
        measure: evaluates the current policy.
        record: records an evaluation; called at its step.
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
        """Record the starting policy."""
        if state.global_step == 0:
            self._record(self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and record every `eval_steps` steps."""
        is_last = state.global_step >= state.max_steps  # after it, the caller measures with samples
        if args.eval_steps and state.global_step % args.eval_steps == 0 and not is_last:
            self._record(self._measure())


def save_initial_evaluation(output_dir: str | Path, evaluation: Evaluation) -> None:
    """Keep the evaluation of the starting policy for sessions that resume the run."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, INITIAL_FILE).write_text(json.dumps(asdict(evaluation)) + "\n", encoding="utf-8")


def load_initial_evaluation(output_dir: str | Path, *, problems: Sequence[Problem], samples: int) -> Evaluation | None:
    """The evaluation that `save_initial_evaluation` kept; None if there is none on these problems with this number of
    samples per problem."""
    try:
        kept = json.loads(Path(output_dir, INITIAL_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # the run was killed before the file was complete
        return None
    figures: dict[str, Any] = {
        name: Estimate(**kept[name]) if kept.get(name) else None
        for name in ("greedy", "sampled", "pass_at_k", "lenient", "lenient_sampled")
    }
    figures["pass_at"] = {int(k): Estimate(**estimate) for k, estimate in kept["pass_at"].items()}
    figures["kinds"] = {
        column: {value: Estimate(**estimate) for value, estimate in values.items()}
        for column, values in kept["kinds"].items()
    }
    evaluation = Evaluation(**kept | figures)
    return evaluation if (evaluation.problems_digest, evaluation.k) == (digest_of(problems), samples) else None
