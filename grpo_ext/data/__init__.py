"""Problems for a run: a data set from the Hub or from local files, with a prompt and a gold answer per row.

`files.py` loads splits. `shapes.py` finds the question and the gold answer of a row. `cells.py` converts cells to text
and lists the rows that cannot be judged. `problems.py` formats prompts and separates the held-out rows. `programs.py`
is for problems whose answers are programs.
"""

from grpo_ext.data.cells import answer_of, question_of, reads_gold
from grpo_ext.data.files import Splits, load_splits
from grpo_ext.data.problems import (
    DEFAULT_FORMAT,
    PLAIN_PROMPT,
    SYSTEM_PROMPT,
    Problems,
    PromptFormat,
    format_rows,
    is_chat,
    judged_rows,
    load_problems,
    sample_rows,
)
from grpo_ext.data.shapes import ANSWER_COLUMNS, PROMPT_COLUMNS, find_shape, program_tests, refuse_unread_tests

__all__ = [
    "ANSWER_COLUMNS",
    "DEFAULT_FORMAT",
    "PLAIN_PROMPT",
    "PROMPT_COLUMNS",
    "SYSTEM_PROMPT",
    "Problems",
    "PromptFormat",
    "Splits",
    "answer_of",
    "find_shape",
    "format_rows",
    "is_chat",
    "judged_rows",
    "load_problems",
    "load_splits",
    "program_tests",
    "question_of",
    "reads_gold",
    "refuse_unread_tests",
    "sample_rows",
]
