"""Find the question and the gold answer in a row, whatever their columns are called.

find_shape(["Problem", "Answer"], "aime.jsonl")   ->  Shape(prompt="Problem", answer="Answer")
find_shape(["prompt", "reward_model"], "dapo")    ->  Shape(prompt="prompt", answer="reward_model.ground_truth")
find_shape(["instruction", "input", "output"], "alpaca")  ->  Shape(prompt="instruction", answer="output", ...)

A dot in the name of a column selects a key of a dict. Flags take precedence over recognised columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ext.rewards.code.formats import FORMATS

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution", "code")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The columns of the question and the gold answer.

    Attributes:
        prompt: column of the question, with dots for the keys of a dict.
        answer: column of the gold answer, likewise; None if the rows have none.
        context: column with text to append to the question as a paragraph of its own; None if there is none.
    """

    prompt: str
    answer: str | None
    context: str | None = None


def find_shape(
    columns: Sequence[str],
    name: str,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    needs_answer: bool = True,
    features: Any = None,
) -> Shape:
    """The shape of rows that have these columns.

    Args:
        name: name of the data, for error messages.
        prompt_column, answer_column: columns given by the user; None to recognise them.
        needs_answer: whether data without a gold answer is refused.
        features: types of the columns, which list the keys of a dict; None if they are unknown.

    Raises:
        ValueError: a given column does not exist, or none is recognised; the message lists columns and flags.
    """
    for flag, given in (("--prompt_column", prompt_column), ("--answer_column", answer_column)):
        if given is not None and given not in columns and given.partition(".")[0] not in columns:
            raise ValueError(f"{flag} {given}: {name} has no such column; it has: {', '.join(columns)}.")
    by_name = {column.casefold(): column for column in reversed(columns)} | {column: column for column in columns}
    context = None
    prompt = prompt_column or _first(PROMPT_COLUMNS, by_name)
    if prompt is None and "instruction" in by_name:  # alpaca
        prompt, context = by_name["instruction"], by_name.get("input")
    if prompt is None and {"text", "test_list"} <= by_name.keys():  # MBPP
        prompt = by_name["text"]
    if prompt is None and not {"question_content", "public_test_cases"} - by_name.keys():  # LiveCodeBench
        prompt = by_name["question_content"]
    if prompt is None and not {"description", "public_tests"} - by_name.keys():  # CodeContests
        prompt = by_name["description"]
    if prompt is None and {"nums", "target"} <= by_name.keys():
        raise ValueError(
            f"{name} has the columns of Countdown (nums, target), a puzzle with many right answers, so there is no "
            f"gold answer to compare with. Type: grpo-ext train logic --dataset_name countdown. It generates such "
            f"puzzles and checks the equation."
        )
    if prompt is None:
        raise ValueError(_unknown("prompt", PROMPT_COLUMNS, columns, name))
    answer = answer_column or _first(ANSWER_COLUMNS, by_name)
    if answer is None and _has_key(features, by_name.get("reward_model"), "ground_truth"):  # verl
        answer = f"{by_name['reward_model']}.ground_truth"
    if answer is None and "instruction" in by_name:
        answer = by_name.get("output")
    if answer is None and needs_answer:
        tests = program_tests(columns)
        way_out = f" It has tests of programs ({', '.join(tests)}): type grpo-ext train coding." if tests else ""
        raise ValueError(_unknown("answer", ANSWER_COLUMNS, columns, name) + way_out)
    return Shape(prompt=prompt, answer=answer, context=context)


def value_at(row: dict[str, Any], place: str) -> Any:
    """The cell of a row at a column or a path of keys; None if it is missing."""
    if place in row:
        return row[place]
    value: Any = row
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def refuse_unread_tests(columns: Sequence[str], name: str) -> None:
    """Refuse data without tests in a format that the code reward can read.

    Raises:
        ValueError: there are none; the message lists the formats.
    """
    if not program_tests(columns):
        readable = ", or ".join(" and ".join(kind) for kind in FORMATS)
        raise ValueError(
            f"{name} has no tests for the code reward, which reads {readable}. Columns of the data: "
            f"{', '.join(columns)}."
        )


def program_tests(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold tests of programs; () if there are none."""
    return next((kind for kind in FORMATS if set(kind) <= set(columns)), ())


def _first(candidates: Sequence[str], by_name: dict[str, str]) -> str | None:
    return next((by_name[candidate] for candidate in candidates if candidate in by_name), None)


def _has_key(features: Any, column: str | None, key: str) -> bool:
    if column is None or features is None:
        return False
    kind = features[column]
    return isinstance(kind, dict) and key in kind


def _unknown(role: str, candidates: Sequence[str], columns: Sequence[str], name: str) -> str:
    return (
        f"{name} needs a column for the {role}, one of: {', '.join(candidates)}; "
        f"it has: {', '.join(columns)}. Name another one with --{role}_column COLUMN."
    )
