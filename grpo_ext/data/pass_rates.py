"""Pass rates of training problems before a run: from a column of the data, or from a file of `grpo-ext eval`.

    {"prompt": "Question: 538+478=?\\nAnswer:", "answers": 8, "passes": 3}          one line of the file per problem

A file is matched with the data by prompt, so the prompts of the evaluation must be those of the run.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DIFFICULTY = "difficulty"  # the column whose numbers are read as 1 - pass rate


@dataclass(frozen=True, kw_only=True)
class PassRate:
    """How often answers to a problem were right.

    Attributes:
        rate: share of right answers, 0 to 1.
        answers: number of answers that it was estimated from.
    """

    rate: float
    answers: float


def write_pass_rates(path: str | Path, prompts: Sequence[Any], shares: Sequence[float], answers: int) -> None:
    """Write the file: for each prompt, the share of its answers that are right."""
    with Path(path).open("w", encoding="utf-8") as file:
        for prompt, share in zip(prompts, shares, strict=True):
            file.write(json.dumps({"prompt": prompt, "answers": answers, "passes": round(share * answers)}) + "\n")


def read_pass_rates(source: str, rows: Any, *, answers: int) -> list[PassRate | None]:
    """The pass rate of each row of the training data; None if it is unknown.

    Args:
        source: a column of the data with numbers from 0 to 1, or else a file. The column `difficulty` has 1 for the
            hardest problems.
        rows: the training data.
        answers: the number of answers that a value of a column counts as.

    Raises:
        ValueError: there is neither such a column nor such a file, a value is not a number from 0 to 1, or no prompt of
            the file is in the data.
    """
    if source in rows[0]:
        return _from_column(source, _column(rows, source), answers)
    if not Path(source).is_file():
        raise ValueError(
            f"start_pass_rates={source!r} is neither a column of the training data, which has "
            f"{', '.join(map(repr, rows[0]))}, nor a file. `grpo-ext eval --samples 8 --save_pass_rates FILE` writes "
            f"one."
        )
    return _from_file(Path(source), _column(rows, "prompt"))


def _column(rows: Any, name: str) -> Iterable[Any]:
    is_stored = name in (getattr(rows, "column_names", None) or ())
    return rows[name] if is_stored else (rows[i][name] for i in range(len(rows)))


def _from_column(name: str, values: Iterable[Any], answers: int) -> list[PassRate | None]:
    found: list[PassRate | None] = []
    for row, value in enumerate(values):
        is_number = isinstance(value, int | float)
        if value is not None and not (is_number and 0 <= value <= 1):
            raise ValueError(
                f"start_pass_rates={name!r} needs numbers from 0 to 1 in that column, or no value, got {value!r} in "
                f"row {row}. Rescale them: a pass rate is the share of right answers, a difficulty is 1 minus that."
            )
        rate = value if value is None or name != DIFFICULTY else 1 - value
        found.append(None if rate is None else PassRate(rate=float(rate), answers=float(answers)))
    return found


def _from_file(path: Path, prompts: Iterable[Any]) -> list[PassRate | None]:
    totals: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            key, answers, passes = _key(row["prompt"]), int(row["answers"]), int(row["passes"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"start_pass_rates={str(path)!r}: line {number} is not a JSON object with `prompt`, `answers` and "
                f"`passes`. `grpo-ext eval --samples 8 --save_pass_rates FILE` writes such a file."
            ) from error
        if not 0 <= passes <= answers:
            raise ValueError(f"start_pass_rates={str(path)!r}: line {number} has {passes} passes of {answers} answers.")
        before = totals.get(key, (0, 0))
        totals[key] = before[0] + answers, before[1] + passes
    found: list[PassRate | None] = []
    for prompt in prompts:
        answers, passes = totals.get(_key(prompt), (0, 0))
        found.append(PassRate(rate=passes / answers, answers=float(answers)) if answers else None)
    known = sum(rate is not None for rate in found)
    if known == 0:
        raise ValueError(
            f"start_pass_rates={str(path)!r} has none of the {len(found)} prompts of the training data. Evaluate the "
            f"rows of the training split, with the prompts of the run: --split train, and the same --chat."
        )
    if known < len(found):
        logger.warning(f"{path} has pass rates of {known} of {len(found)} training problems; the others are unseen.")
    return found


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
