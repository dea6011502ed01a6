"""Problems whose answers are programs: their prompts, and the rows whose tests the code reward supports.

    (rows,), note = with_supported_tests("'mbpp.jsonl'", rows)
    rows, _ = format_rows(rows, tokenizer, "'mbpp.jsonl'", PROGRAM_FORMAT)

`rewards/code/formats.py` lists the columns that hold tests.
"""

from typing import Any

from datasets import Dataset

from grpo_ext.data.problems import PromptFormat
from grpo_ext.data.shapes import refuse_unread_tests
from grpo_ext.rewards import program_reward


def _question(text: str, row: dict[str, Any]) -> str:
    """The task, with one of its tests if only the tests name the function."""
    tests = row.get("test_list")
    return f"{text}\nYour program must pass this test:\n{tests[0]}" if tests else text


PROGRAM_FORMAT = PromptFormat(
    system="Write the program that is asked for, in one block fenced as ```python.",
    plain="{question}\nThe program in Python:\n",
    question=_question,
    needs_answer=False,
)


def with_supported_tests(name: str, *sets: Dataset) -> tuple[list[Dataset], str]:
    """Each set of rows without those whose tests the code reward does not support, and a note on the rows left out.

    Args:
        name: name of the data, for error messages.

    Raises:
        ValueError: the data has no columns with tests, or no row of a set has tests that the reward supports.
    """
    refuse_unread_tests(sets[0].column_names, name)
    supported = [rows.filter(_is_supported) for rows in sets]
    if not all(map(len, supported)):
        raise ValueError(
            f"No problem of {name} has tests that the code reward supports; rewards/code/formats.py says which columns "
            f"hold tests, and in which form."
        )
    left_out = sum(map(len, sets)) - sum(map(len, supported))
    return supported, f"{left_out} problems with unsupported tests were left out" if left_out else ""


def _is_supported(row: dict[str, Any]) -> bool:
    """Whether the reward supports the tests of a row. Nothing is run, since the program is empty."""
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    try:
        return program_reward([""], **columns) != [None]
    except ValueError:
        return False
