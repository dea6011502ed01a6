"""Record the completions of each rollout in `completions.jsonl`, for the report of the run."""

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainingArguments

from grpo_ext.report.completions_file import CompletionInfo, append_completions
from grpo_ext.report.display_text import gold_answer
from grpo_ext.rollout.types import RolloutInProgress


class Recorder:
    """Appends each rollout of training to `completions.jsonl`.

    Args:
        args: arguments of the trainer.
        writes: whether this process writes the file.
    """

    def __init__(self, args: TrainingArguments, *, writes: bool):
        self._args, self._writes = args, writes

    def __call__(self, rollout: RolloutInProgress, is_cut: list[bool], *, step: int, logs: dict[str, Any]) -> None:
        """Record the rows of this process; every process calls it.

        Args:
            rollout: the rollout, with its rewards.
            is_cut: whether each row was cut off.
            step: the optimizer step that the rollout is for, counted from 1.
            logs: TRL's table of completions, which ends with this rollout.
        """
        rows = [
            CompletionInfo(tokens=len(ids), is_cut=cut, gold=gold_answer(example))
            for example, ids, cut in zip(rollout.scored_examples, rollout.completion_ids, is_cut, strict=True)
        ]
        rows = gather_object(rows)
        if self._writes:
            append_completions(self._args, step, logs, rows, rollout.extra_columns)
