"""Find the question and the gold answer in a row, whatever their columns are called.

find_shape(["Problem", "Answer"], "aime.jsonl")   ->  Shape(prompt="Problem", answer="Answer")
find_shape(["prompt", "reward_model"], "dapo")    ->  Shape(prompt="prompt", answer="reward_model.ground_truth")
find_shape(["instruction", "input", "output"], "alpaca")  ->  Shape(prompt="instruction", answer="output", ...)

A dot in the name of a column goes into a dict. Flags win over what is recognised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution", "code")

# Test columns of the code reward, and those of public data sets that it cannot read: name -> columns and what to do.
READ_TESTS = (("test_list",), ("entry_point", "inputs", "outputs"), ("stdin", "stdout"))
UNREAD_TESTS = {
    ("public_test_cases",): "LiveCodeBench",
    ("public_tests",): "CodeContests",
    ("input_output",): "APPS or TACO",
    ("test", "entry_point"): "HumanEval",
    ("test",): "KodCode",
}
HOW_TO_WRITE_TESTS = {
    "LiveCodeBench": "give each row `stdin` and `stdout`, the lists of `input` and `output` of its test cases",
    "CodeContests": "give each row `stdin` and `stdout`: row['stdin'] = row['public_tests']['input'], row['stdout'] = "
    "row['public_tests']['output']",
    "APPS or TACO": "give each row `stdin` and `stdout`: tests = json.loads(row['input_output']), row['stdin'] = "
    "tests['inputs'], row['stdout'] = tests['outputs']",
    "HumanEval": "give each row `test_list`, its assertions as texts that call the function by its name instead of "
    "`candidate`",
    "KodCode": "give each row `test_list`, its assertions as texts",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Where a row has its question and its gold answer.

    Attributes:
        prompt: the column of the question, with dots for the keys of a dict.
        answer: the same for the gold answer; None if the rows have none.
        context: a column whose text, if there is one, follows the question in a paragraph of its own; or None.
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
        name: of the data, for error messages.
        prompt_column, answer_column: named by the user; None to recognise them.
        needs_answer: whether rows without a gold answer are refused.
        features: types of the columns, to tell what a dict holds; None if they are unknown.

    Raises:
        ValueError: a named column does not exist, or none is recognised; the message lists columns and flags.
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
            f"{name} has the shape of Countdown (nums, target): an equation that many answers solve, so there is no "
            f"gold answer to compare with. Type: grpo-ext train logic --dataset_name countdown, which makes such "
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
        tests = _tests_of(columns)
        way_out = f" It has the tests of {tests}: type grpo-ext train coding." if tests else ""
        raise ValueError(_unknown("answer", ANSWER_COLUMNS, columns, name) + way_out)
    return Shape(prompt=prompt, answer=answer, context=context)


def value_at(row: dict[str, Any], place: str) -> Any:
    """The cell of a row; None if a dict on the way is missing."""
    if place in row:
        return row[place]
    value: Any = row
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def refuse_unread_tests(columns: Sequence[str], name: str) -> None:
    """Refuse tests in a format that the code reward cannot read.

    Raises:
        ValueError: there are no others; the message says whose format it is, and how to write the tests.
    """
    if any(set(kind) <= set(columns) for kind in READ_TESTS):
        return
    readable = ", or ".join(" and ".join(kind) for kind in READ_TESTS)
    tests = _tests_of(columns)
    if tests is not None:
        raise ValueError(
            f"{name} has the tests of {tests}, a format that the code reward cannot read. Write a .jsonl file that "
            f"it can: {HOW_TO_WRITE_TESTS[tests]}."
        )
    raise ValueError(f"{name} has no tests: the code reward reads {readable}; it has: {', '.join(columns)}.")


def program_tests(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold tests of programs, whether the code reward can read them or not; () if there are none."""
    return next((kind for kind in (*READ_TESTS, *UNREAD_TESTS) if set(kind) <= set(columns)), ())


def _tests_of(columns: Sequence[str]) -> str | None:
    return next((known for kind, known in UNREAD_TESTS.items() if set(kind) <= set(columns)), None)


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
        f"it has: {', '.join(columns)}. Name it: --{role}_column COLUMN."
    )
