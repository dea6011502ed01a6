"""Write `completions.jsonl`: completions and their rewards, one JSON object per rollout.

    {"step": 3, "left_out": 0, "groups": [{"prompt": "538+478=?", "gold": "1016", "answers": [
        {"text": "#### 1016", "rewards": {"math_answer_reward": 1.0}, "advantage": 0.93, "tokens": 8, "cut": false,
         "found": "1016", "extra": {}}, ...]}, ...]}

The size of a row is limited: up to 2,000 characters per text, half of them from its end, and the first 16 groups of a
rollout, or fewer if their completions exceed half a million characters. The page shows a sample of the rows, see
`read_downsampled`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.display_text import MAX_VALUE_CHARACTERS, final_answer_text, shorten, to_text
from grpo_ext.report.run_files import COMPLETIONS_FILE, append_row, keep_rows_until

MAX_GROUPS, MAX_ROLLOUT_CHARACTERS = 16, 500_000


class CompletionsFile(TrainerCallback):
    """Starts `output_dir/completions.jsonl`: empty, or with the rows up to the step that the run resumes from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, on the main process."""
        if state.is_world_process_zero:
            keep_rows_until(completions_path(args), state.global_step)


def completions_path(args: TrainingArguments) -> Path:
    """The completions file of a run with these arguments."""
    assert args.output_dir is not None
    return Path(args.output_dir, COMPLETIONS_FILE)


@dataclass(frozen=True, kw_only=True)
class CompletionInfo:
    """What is known about a completion when it is scored, in addition to its text.

    Attributes:
        tokens: its length in tokens.
        is_cut: whether it reached the length limit before it ended.
        gold: the gold answer; None if the data has none.
    """

    tokens: int
    is_cut: bool
    gold: str | None


def append_completions(
    args: TrainingArguments, step: int, logs: dict[str, Any], infos: list[CompletionInfo], extra: list[str]
) -> None:
    """Add a row for one rollout.

    Args:
        step: the optimizer step that the rollout is for, counted from 1.
        logs: TRL's `_logs`, which end with the completions of this rollout; those of a group are adjacent.
        infos: of the completions of all processes, in the same order.
        extra: columns that rewards logged in this rollout; TRL's logs also have older columns.
    """
    G = args.num_generations

    def newest(values: Iterable[Any]) -> list[Any]:
        return list(values)[-len(infos) :]

    prompts, completions, advantages = (newest(logs[name]) for name in ("prompt", "completion", "advantages"))
    rewards = {name: newest(values) for name, values in logs["rewards"].items()}
    columns = {name: newest(logs["extra"][name]) for name in extra}

    def answer(i: int) -> dict[str, Any]:
        """The record of completion i."""
        text = to_text(completions[i])
        return {
            "text": shorten(text),
            "rewards": {name: _json_number(values[i]) for name, values in rewards.items()},
            "advantage": _json_number(advantages[i]),
            "tokens": infos[i].tokens,
            "cut": infos[i].is_cut,
            "found": final_answer_text(text),
            "extra": {name: shorten(str(values[i]), MAX_VALUE_CHARACTERS) for name, values in columns.items()},
        }

    groups: list[dict[str, Any]] = []
    characters = 0
    for i in range(0, min(len(infos), MAX_GROUPS * G), G):
        answers = [answer(i + j) for j in range(G)]
        characters += sum(len(record["text"]) for record in answers)
        if groups and characters > MAX_ROLLOUT_CHARACTERS:
            break
        groups.append({"prompt": shorten(to_text(prompts[i])), "gold": infos[i].gold, "answers": answers})
    left_out = len(infos) // G - len(groups)
    append_row(completions_path(args), {"step": step, "left_out": left_out, "groups": groups})


def _json_number(value: float | None) -> float | None:
    """The value rounded to four digits; None if it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
