"""Records what the policy wrote in each rollout, for the report of the run: `completions.jsonl`."""

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainingArguments

from grpo_ext.report.completions_file import Judged, append_completions
from grpo_ext.report.display_text import gold_of


class Recorder:
    """Appends each rollout of training to `completions.jsonl`.

    Args:
        args: of the trainer.
        writes: whether this process writes the file.
    """

    def __init__(self, args: TrainingArguments, *, writes: bool):
        self._args, self._writes = args, writes

    def __call__(
        self,
        examples: list[dict[str, Any]],
        completion_ids: list[list[int]],
        is_cut: list[bool],
        *,
        step: int,
        logs: dict[str, Any],
        extra_columns: list[str],
    ) -> None:
        """Record the rows of this process; every process calls it.

        Args:
            examples: rows of the dataset, as reward functions saw them.
            step: the optimizer step that the rollout is for, from 1.
            logs: TRL's table of completions, which ends with this rollout.
            extra_columns: columns that reward functions logged in it.
        """
        rows = [
            Judged(tokens=len(ids), is_cut=cut, gold=gold_of(example))
            for example, ids, cut in zip(examples, completion_ids, is_cut, strict=True)
        ]
        rows = gather_object(rows)
        if self._writes:
            append_completions(self._args, step, logs, rows, extra_columns)
