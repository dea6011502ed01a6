r"""1.0 where the final answer of a completion equals the gold answer, 0.0 where it does not.

    math_answer_reward(["so 6*7 = \\boxed{42}", "#### 41"], answer=["42", "42"])  ->  [1.0, 0.0]

`rewards.math.final_answer` tells where the final answer stands, `rewards.math.answer` when two answers are the same. In
short: 1/2, 0.5, \frac12 and 50% are the same, and 50% is also 50; "5 apples", "$5", "5 km" and "x = 5" are 5; 1,000 is
a thousand, 1.000 is one; 0.333 is not 1/3, nor 3.46 the root of 12. These earn nothing:

- several candidates: `5 or 6`, `5, 6`; but of several `\boxed{}` the last counts
- arithmetic left undone where the gold answer is a number: `737+844`, `48/2`, `2^{10}`
- an equation that is not solved, or a chain with a wrong step: `5x = 25` for x = 5, `x = 5 = 6`
- the question copied: an expression that stands in the prompt word for word, unless the gold answer is written so

Known limits. Units are not compared: 5 km is 5 m. Capital and small letters are the same variable. A bare list has no
order: write the gold answer as (1, 2, 3) where the order counts. Products of three or more bare letters, `xyz`, are
compared as words. Unions of intervals have to be cut in the same way. Equations are the same up to a constant factor:
xy = 1 is not y = 1/x. An exact value beside a rounded one (`\sqrt{2} \approx 1.41`) is two candidates. Roots of
negative numbers are complex, the cube root of -8, too. A fraction need not be in lowest terms, unless it was copied.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from rewards.completion import Completion, text_of
from rewards.math.answer import Answer, is_final, is_readable, read_answer, same
from rewards.math.final_answer import final_answer
from rewards.math.latex import tidy

MAX_PROMPT_CHARACTERS = 4000  # of the end of a prompt, where a copied question is looked for

_TOKEN = re.compile(r"\\?[A-Za-z]+|\d+|\S")
_OPERATOR = re.compile(r"[-+*/^=<>]|\\(?:frac|sqrt|cdot|times|le|ge)")


@dataclass(frozen=True)
class MathAnswerReward:
    """The reward; `strict` takes an answer in `\\boxed{}` only, and no other marker."""

    strict: bool = False
    judges_alone: ClassVar[bool] = True  # see `rewards.workers.pool`: Math-Verify's time has no other sure bound

    @property
    def __name__(self) -> str:
        """What TRL logs it as."""
        return "strict_math_answer_reward" if self.strict else "math_answer_reward"

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[object],
        prompts: Sequence[Completion] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Score completions by equality of their final answer with the gold one.

        Args:
            completions: strings, or chat completions `[{"role": "assistant", "content": ...}]`; of the latter the last
                message counts.
            answer: the gold answers, one a completion: a bare answer, or a solution that marks its answer (gsm8k's
                `... #### 42`).
            prompts: what was asked, as TRL passes it, to tell a copied question from an answer.
            columns: the other columns of the data, unused.

        Returns:
            1.0 right, 0.0 wrong or no final answer, None where the gold answer cannot be read; see `check_gold`.
        """
        asked = [""] * len(completions) if prompts is None else map(text_of, prompts)
        rows = zip(map(text_of, completions), answer, asked, strict=True)
        return [self._score(*row) for row in rows]

    def _score(self, text: str, gold: object, prompt: str) -> float | None:
        marked = _without_marker(gold)
        expected = _read_gold(marked)
        if expected is None:
            return None
        written = final_answer(text, boxed_only=self.strict) or ""
        received = read_answer(written)
        if received is None or not same(expected, received):
            return 0.0
        return 1.0 if is_final(received) or not _is_copied(written, marked, prompt) else 0.0


math_answer_reward = MathAnswerReward()


def check_gold(answer: Sequence[object]) -> None:
    """ValueError that names the rows whose gold answer cannot be read; to be called before a run on its `answer`s."""
    bad = [row for row, gold in enumerate(answer) if _read_gold(_without_marker(gold)) is None]
    if bad:
        shown = ", ".join(f"row {row}: {str(answer[row])[:60]!r}" for row in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(answer)} gold answers cannot be read, counted from 0: {shown}"
            f"{', ...' if len(bad) > 5 else ''}. Valid: a number, an expression in LaTeX, a list or up to five words, "
            f"bare or marked as the last \\boxed{{...}}, <answer>...</answer> or #### ... of a solution."
        )


def _without_marker(gold: object) -> str:
    text = "" if gold is None else str(gold)
    return final_answer(text) or text.strip()


@lru_cache(maxsize=4096)  # a group shares its gold answer
def _read_gold(gold: str) -> Answer | None:
    answer = read_answer(gold)
    return answer if is_readable(answer) else None


def _is_copied(answer: str, gold: str, prompt: str) -> bool:
    """Whether an answer with an operator stands in the prompt, not as a part of something longer."""
    wanted, known, asked = (_TOKEN.findall(tidy(text)) for text in (answer, gold, prompt[-MAX_PROMPT_CHARACTERS:]))
    if wanted == known or not any(map(_OPERATOR.fullmatch, wanted)):
        return False
    for start in range(len(asked) - len(wanted) + 1):
        before, *here, after = ["", *asked, ""][start : start + len(wanted) + 2]
        if here == wanted and not re.fullmatch(r"[A-Za-z+*/^-]|\d+", before) and after not in ("+", "-", "*", "/", "^"):
            return True
    return False
