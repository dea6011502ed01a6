"""Puzzles of reasoning-gym, made offline, and its own scores for them: `pip install "grpo-ext[logic]"`.

    train, heldout = logic_problems("chain_sum", train=1000, heldout=200, seed=0)
    train[0]  ->  {"question": "What is 4 + 3?", "answer": "7", "task": "chain_sum", "metadata": "{...}"}
    logic_reward(["<answer>7</answer>"], answer=["7"], task=["chain_sum"], metadata=["{...}"])  ->  [1.0]

The answer is the final answer as in `rewards.math.final_answer`, else the last line that is not blank; an answer of
several lines has to stand in `<answer>` tags. Scores stay as reasoning-gym gives them, partial ones too: many scorers
pay a little for any answer in the right form, or for the right answer inside a longer one, so look at the held-out
share of full scores, not at the mean reward alone.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import reasoning_gym

from rewards.completion import Completion, text_of
from rewards.math.final_answer import final_answer
from rewards.workers.deadline import DeadlinePassed, within

SCORING_SECONDS = 2.0  # for one answer, in the main thread

_RUNS_TEXT = "its scorer runs the model's text as Python"
REFUSED = {
    "polynomial_multiplication": _RUNS_TEXT,
    "simple_integration": _RUNS_TEXT,
    "intermediate_integration": _RUNS_TEXT,
    "game_of_life_halting": "its scorer gives every answer the full score",
    "arc_agi": "its scorer compares tuples, which JSON does not keep",
    "rearc": "its scorer compares tuples, which JSON does not keep",
    "composite": "it is a mixture; name its tasks one by one",
}
# These scorers run the model's text as well, or as many moves as it says: they see nothing but what they ask for.
_ARITHMETIC = r"(?!.*(?:\*\*|//|\d{7}))[\d\s+*/()-]{1,200}"
_LISTS_OF_NUMBERS = r"[\d\s,\[\]-]*"
HARMLESS = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": _LISTS_OF_NUMBERS,
    "spiral_matrix": _LISTS_OF_NUMBERS,
    "string_insertion": r"[A-Z\s,\[\]'\"]*",
    "propositional_logic": r"(?s:.{0,300})",  # takes time by the square of the length
    "n_queens": r"[Q_\s,\[\]'\"]*",
    "rubiks_cube": r"(?:[A-Za-z']{1,4}\d?(?:\s+|$)){0,200}",
    "rush_hour": r"(?:[A-Z][+-]\d\s*){0,200}",
}
# NaN compares equal to everything in some scorers; 1e999999999 as an exact fraction would fill the memory.
_NOT_A_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b|\d[eE][-+]?\d{4}", re.IGNORECASE)


def logic_problems(
    task: str, *, train: int, heldout: int, seed: int = 0, **config: Any
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out problems of one task, no question in both or twice.

    Both are cut from one stream, since a stream with the next seed repeats nearly all of its problems.

    Args:
        task: a name of reasoning-gym, such as "chain_sum", "countdown", "knights_knaves", "sudoku".
        train: how many problems to train on.
        heldout: how many to hold out.
        seed: the same seed, the same problems.
        config: options of the task, such as `min_terms=3` for "chain_sum".

    Returns:
        Rows of four texts, for `datasets.Dataset.from_list`: `question`, `answer` ("" where many answers are right),
        `task` and `metadata` (JSON for the scorer).

    Raises:
        ValueError: for a task that does not exist, is refused (REFUSED says why), or has too few different questions.
    """
    wanted = train + heldout
    data = _dataset(task, json.dumps({**config, "seed": seed, "size": 2 * wanted}))
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
            f"{task!r} gave {len(rows)} different questions among {2 * wanted}; {train} + {heldout} were asked for. "
            f"Ask for fewer, or make its problems more varied by its options."
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
    """reasoning-gym's score of each completion's final answer, mostly 0 to 1.

    Args:
        completions: strings or chat completions; of the latter the last message counts.
        answer, task, metadata: columns of `logic_problems`.
        columns: the other columns, unused.

    Returns:
        A score a completion; 0.0 where there is no answer, or where the scorer fails on it.

    Raises:
        ValueError: for a task that does not exist or is refused, and metadata that are not those of `logic_problems`.
    """
    rows = zip(map(text_of, completions), answer, task, metadata, strict=True)
    return [_score(text, *row) for text, *row in rows]


vars(logic_reward)["judges_alone"] = True  # see `rewards.workers.pool`: it runs in worker processes


def _score(text: str, gold: str, task: str, metadata: str) -> float:
    try:
        details = json.loads(metadata)
        config, entry = details["config"], {"question": "", "answer": gold, "metadata": details["metadata"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Metadata of {task!r} are not those of logic_problems: {str(metadata)[:80]!r}") from error
    score = _dataset(task, json.dumps(config)).score_answer
    lines = text.strip().rsplit("\n", 1)
    received = final_answer(text) or lines[-1].strip()
    if not received or (received != gold and not _is_harmless(task, received)):
        return 0.0
    try:
        value = float(within(SCORING_SECONDS, lambda: score(received, entry)))
    except (Exception, DeadlinePassed):  # whatever a model wrote
        return 0.0
    return value if math.isfinite(value) else 0.0


def _is_harmless(task: str, answer: str) -> bool:
    return not _NOT_A_NUMBER.search(answer) and bool(re.fullmatch(HARMLESS.get(task, "(?s:.*)"), answer))


@lru_cache(maxsize=64)
def _dataset(task: str, config: str) -> Any:
    """The task's generator and scorer."""
    if task in REFUSED:
        raise ValueError(f"{task!r} is not offered: {REFUSED[task]}.")
    if task not in reasoning_gym.factory.DATASETS:
        valid = ", ".join(sorted(set(reasoning_gym.factory.DATASETS) - set(REFUSED)))
        raise ValueError(f"reasoning-gym has no task {task!r}. It has: {valid}.")
    try:
        return reasoning_gym.create_dataset(task, **json.loads(config))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{task!r} does not take {config}: {error}") from error
