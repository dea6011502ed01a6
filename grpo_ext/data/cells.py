"""Convert the cells of a data set to text, and list the rows that cannot be judged.

None means that there is no answer, and must not become the gold answer "None":

    cell_text(None)     ->  Unreadable("is missing")         cell_text(["256"])       ->  "256"
    cell_text(256.0)    ->  "256"                            cell_text(["2", "3"])    ->  Unreadable("is a list of 2")
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grpo_ext.data.shapes import Shape, value_at
from grpo_ext.rewards import check_gold

LARGEST_WHOLE = 2.0**53  # above it, a float cannot represent every whole number
SHOWN_ROWS = 5
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Unreadable:
    """A cell that has no text; `reason` is a predicate, such as "is missing"."""

    reason: str


def cell_text(value: Any) -> str | Unreadable:
    """The text of a cell. A list of one is read as its element; a whole number in a column of floats gets no `.0`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Unreadable("is missing")
    if isinstance(value, list):
        if len(value) == 1:
            return cell_text(value[0])
        return Unreadable(f"is a list of {len(value)}")
    if isinstance(value, dict):
        return Unreadable("is a dict")
    if isinstance(value, float):
        if math.isinf(value):
            return Unreadable("is infinite")
        return str(int(value)) if value.is_integer() and abs(value) < LARGEST_WHOLE else str(value)
    text = str(value)
    return text if text.strip() else Unreadable("is empty")


def is_messages(value: Any) -> bool:
    """Whether a cell holds the messages of a chat."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "role" in part for part in value)


def question_of(row: dict[str, Any], shape: Shape) -> str | list[dict[str, Any]] | Unreadable:
    """The question of a row: text, or messages unchanged."""
    value = value_at(row, shape.prompt)
    if is_messages(value):
        return value if any(message.get("content") for message in value) else Unreadable("is empty")
    text = cell_text(value)
    context = cell_text(value_at(row, shape.context)) if shape.context is not None else Unreadable("is missing")
    return f"{text}\n\n{context}" if isinstance(text, str) and isinstance(context, str) else text


def answer_of(row: dict[str, Any], shape: Shape) -> str | None:
    """The gold answer of a row as text; None if there is none."""
    text = cell_text(value_at(row, shape.answer)) if shape.answer is not None else None
    return text if isinstance(text, str) else None


def reads_gold(answer: str) -> bool:
    """Whether the math reward can read a gold answer."""
    try:
        check_gold([answer])
    except ValueError:
        return False
    return True


def unreadable_rows(
    rows: Iterable[dict[str, Any]], shape: Shape, *, judges_answers: bool, reads_gold: Callable[[str], bool] | None
) -> dict[int, str]:
    """The rows that cannot be judged: index -> reason.

    Args:
        judges_answers: False if the reward reads other columns, so that a gold answer may be missing.
        reads_gold: tells whether the reward can read a gold answer; None if it can read any.
    """
    found = {}
    for i, row in enumerate(rows):
        question = question_of(row, shape)
        if isinstance(question, Unreadable):
            found[i] = f"{shape.prompt} {question.reason}"
        elif judges_answers and shape.answer is not None:
            value = value_at(row, shape.answer)
            answer = cell_text(value)
            if isinstance(answer, Unreadable):
                found[i] = f"{shape.answer} {answer.reason}"
            elif reads_gold is not None and not reads_gold(answer):
                found[i] = f"{shape.answer} cannot be read: {answer[:SHOWN_CHARACTERS]!r}"
    return found


def describe_unreadable(found: dict[int, str], total: int, name: str) -> str:
    """`3 of 30 rows of 'problems.jsonl' cannot be judged (rows 0, 3, 6, counted from 0; row 0: answer is missing)`"""
    shown = ", ".join(map(str, list(found)[:SHOWN_ROWS])) + (", ..." if len(found) > SHOWN_ROWS else "")
    row, reason = next(iter(found.items()))
    return (
        f"{len(found)} of {total} rows of {name} cannot be judged (rows {shown}, counted from 0; row {row}: {reason})"
    )
