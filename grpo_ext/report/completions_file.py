"""`completions.jsonl`: what the policy wrote and what it earned, one JSON object a rollout, written line by line.

    {"step": 3, "left_out": 0, "groups": [{"prompt": "538+478=?", "gold": "1016", "answers": [
        {"text": "#### 1016", "rewards": {"math_answer_reward": 1.0}, "advantage": 0.93, "tokens": 8, "cut": false,
         "found": "1016", "extra": {}}, ...]}, ...]}

Bounded: 2,000 characters of a text, half of them from its end; of a rollout the first 16 groups, and as many of them as
have half a million characters together. The page thins it further, see `report/downsample.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.report.display_text import MOST_VALUE_CHARACTERS, clipped, found_in, readable
from grpo_ext.report.jsonl import append_line, keep_lines

COMPLETIONS_FILE = "completions.jsonl"
MOST_GROUPS, ROLLOUT_CHARACTERS = 16, 500_000


class CompletionsFile(TrainerCallback):
    """Begins `output_dir/completions.jsonl` anew, or keeps the steps up to the one that is resumed from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            keep_lines(completions_path(args), state.global_step)


def completions_path(args: TrainingArguments) -> Path:
    """Where the completions of a run with these arguments are."""
    assert args.output_dir is not None
    return Path(args.output_dir, COMPLETIONS_FILE)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a row of a rollout was when the rewards saw it; `gold` is None where the data names no right answer."""

    tokens: int
    is_cut: bool
    gold: str | None


def append_completions(
    args: TrainingArguments, step: int, logs: dict[str, Any], rows: list[Judged], extra: list[str]
) -> None:
    """Add one rollout.

    Args:
        step: the optimizer step that it is for, from 1.
        logs: TRL's `_logs`, which end with the rows of this rollout, groups next to each other.
        rows: of all processes.
        extra: columns that rewards logged in this rollout; TRL keeps older ones as well.
    """
    G = args.num_generations

    def newest(values: Iterable[Any]) -> list[Any]:
        return list(values)[-len(rows) :]

    prompts, completions, advantages = (newest(logs[name]) for name in ("prompt", "completion", "advantages"))
    rewards = {name: newest(values) for name, values in logs["rewards"].items()}
    columns = {name: newest(logs["extra"][name]) for name in extra}

    def answer(i: int) -> dict[str, Any]:
        """What is kept of a completion."""
        text = readable(completions[i])
        return {
            "text": clipped(text),
            "rewards": {name: _number(values[i]) for name, values in rewards.items()},
            "advantage": _number(advantages[i]),
            "tokens": rows[i].tokens,
            "cut": rows[i].is_cut,
            "found": found_in(text),
            "extra": {name: clipped(str(values[i]), MOST_VALUE_CHARACTERS) for name, values in columns.items()},
        }

    groups: list[dict[str, Any]] = []
    characters = 0
    for i in range(0, min(len(rows), MOST_GROUPS * G), G):
        answers = [answer(i + j) for j in range(G)]
        characters += sum(len(one["text"]) for one in answers)
        if groups and characters > ROLLOUT_CHARACTERS:
            break
        groups.append({"prompt": clipped(readable(prompts[i])), "gold": rows[i].gold, "answers": answers})
    left_out = len(rows) // G - len(groups)
    append_line(completions_path(args), {"step": step, "left_out": left_out, "groups": groups})


def _number(value: float | None) -> float | None:
    """Rounded; None where a reward did not judge."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
