"""Puzzles from reasoning-gym, generated offline and scored by its own scorers: `pip install "grpo-ext[logic]"`.

    train, heldout = logic_problems("chain_sum", train=1000, heldout=200, seed=0)
    train[0]  ->  {"question": "What is 4 + 3?", "answer": "7", "task": "chain_sum", "metadata": "{...}"}
    logic_reward(["<answer>7</answer>"], answer=["7"], task=["chain_sum"], metadata=["{...}"])  ->  [1.0]

The answer of a completion is its final answer (`grpo_ext.rewards.math.final_answer`), or else its last
non-blank line. An answer of several lines must be in `<answer>` tags.

Scores are those of reasoning-gym, including partial ones. Many scorers give partial credit to any answer in the right
format, or to the right answer inside a longer one. So watch the held-out rate of full scores, not just the mean reward.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import reasoning_gym

from grpo_ext.rewards.completion import Completion, text_of
from grpo_ext.rewards.math.final_answer import extract_final_answer
from grpo_ext.rewards.workers.deadline import DeadlineExceeded, run_with_deadline

SCORING_SECONDS = 2.0  # time limit per answer, in the main thread

_EXECUTES_TEXT = "its scorer runs the model's text as Python"
UNSUPPORTED_TASKS = {
    "polynomial_multiplication": _EXECUTES_TEXT,
    "simple_integration": _EXECUTES_TEXT,
    "intermediate_integration": _EXECUTES_TEXT,
    "game_of_life_halting": "its scorer gives every answer the full score",
    "arc_agi": "its scorer compares tuples, which JSON does not preserve",
    "rearc": "its scorer compares tuples, which JSON does not preserve",
    "composite": "it is a mixture of tasks; use them one by one",
}
# These scorers also execute the model's text, or as many moves as it states. They only see answers of this form.
_ARITHMETIC = r"(?!(?s:.*)(?:\*\*|//|\d{7}))[\d\s+*/()-]{1,200}"
_NUMBER_LISTS = r"[\d\s,\[\]-]*"
SAFE_ANSWERS = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": _NUMBER_LISTS,
    "spiral_matrix": _NUMBER_LISTS,
    "string_insertion": r"[A-Z\s,\[\]'\"]*",
    "propositional_logic": r"(?s:.{0,300})",  # run time grows with the square of the length
    "n_queens": r"[Q_\s,\[\]'\"]*",
    "rubiks_cube": r"(?:[A-Za-z']{1,4}\d?(?:\s+|$)){0,200}",
    "rush_hour": r"(?:[A-Z][+-]\d\s*){0,200}",
}
# NaN equals everything in some scorers. The exact fraction 1e999999999 would exhaust the memory. It may also be written
# 1.e999999999 or 1e999_999_999, and coin_flip removes commas.
_NOT_A_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b|[\d.,]e[-+,]*[\d_,]{4}", re.IGNORECASE)


def logic_problems(
    task: str, *, train: int, heldout: int, seed: int = 0, **config: Any
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Generate training and held-out problems of one task, without any repeated question.

    Both come from one stream, since a stream with the next seed repeats nearly all of its problems.

    Args:
        task: a task of reasoning-gym, such as "chain_sum", "countdown", "knights_knaves" or "sudoku".
        train: number of training problems.
        heldout: number of held-out problems.
        seed: the same seed generates the same problems.
        config: options of the task, such as `min_terms=3` for "chain_sum".

    Returns:
        (training rows, held-out rows) for `datasets.Dataset.from_list`. Each row has four strings: `question`, `answer`
        ("" if many answers are right), `task` and `metadata` (JSON for the scorer).

    Raises:
        ValueError: the task does not exist, is in UNSUPPORTED_TASKS, or has too few distinct questions.
    """
    wanted = train + heldout
    data = _create_dataset(task, json.dumps({**config, "seed": seed, "size": 2 * wanted}))
    rows: dict[str, dict[str, str]] = {}
    for number in range(2 * wanted):
        if len(rows) == wanted:
            break
        entry = data[number]
        details = json.dumps({"config": config, "metadata": entry["metadata"]}, default=str)
        rows.setdefault(
            entry["question"],
            {"question": entry["question"], "answer": entry["answer"] or "", "task": task, "metadata": details},
        )
    if len(rows) < wanted:
        raise ValueError(
            f"{task!r} generated {len(rows)} distinct questions out of {2 * wanted}; {train} + {heldout} are needed. "
            f"Request fewer, or choose options that make the problems more varied."
        )
    problems = list(rows.values())
    return problems[heldout:], problems[:heldout]


def logic_reward(
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str],
    metadata: Sequence[str],
    **columns: object,
) -> list[float]:
    """Score the final answer of each completion with reasoning-gym's scorer.

    Args:
        completions: strings or chat completions. The last message of a chat completion counts.
        answer, task, metadata: the columns that `logic_problems` returns.
        columns: other columns of the data set, unused.

    Returns:
        One score per completion, for most tasks in [0, 1]; 0.0 if there is no answer or the scorer fails on it.

    Raises:
        ValueError: a task does not exist or is in UNSUPPORTED_TASKS, or metadata do not come from `logic_problems`.
    """
    rows = zip(map(text_of, completions), answer, task, metadata, strict=True)
    return [_score(text, *row) for text, *row in rows]


vars(logic_reward)["scores_independently"] = True  # see `grpo_ext.rewards.workers.pool`


def _score(text: str, gold: str, task: str, metadata: str) -> float:
    try:
        details = json.loads(metadata)
        config, entry = details["config"], {"question": "", "answer": gold, "metadata": details["metadata"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The metadata of {task!r} do not come from logic_problems: {str(metadata)[:80]!r}") from error
    score = _create_dataset(task, json.dumps(config)).score_answer
    lines = text.strip().rsplit("\n", 1)
    received = extract_final_answer(text) or lines[-1].strip()
    if not received or (received != gold and not _is_safe_to_score(task, received)):
        return 0.0
    try:
        value = float(run_with_deadline(SCORING_SECONDS, lambda: score(received, entry)))
    except (Exception, DeadlineExceeded):  # model-written text can make a scorer raise anything
        return 0.0
    return value if math.isfinite(value) else 0.0


def _is_safe_to_score(task: str, answer: str) -> bool:
    return not _NOT_A_NUMBER.search(answer) and bool(re.fullmatch(SAFE_ANSWERS.get(task, "(?s:.*)"), answer))


@lru_cache(maxsize=64)
def _create_dataset(task: str, config: str) -> Any:
    """The generator and scorer of a task, built from its options as JSON text."""
    if task in UNSUPPORTED_TASKS:
        raise ValueError(f"{task!r} is not supported: {UNSUPPORTED_TASKS[task]}.")
    if task not in reasoning_gym.factory.DATASETS:
        valid = ", ".join(sorted(set(reasoning_gym.factory.DATASETS) - set(UNSUPPORTED_TASKS)))
        raise ValueError(f"reasoning-gym has no task {task!r}. Valid tasks: {valid}.")
    try:
        return reasoning_gym.create_dataset(task, **json.loads(config))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{task!r} does not accept the options {config}: {error}") from error
