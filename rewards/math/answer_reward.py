r"""The math reward: 1.0 if the final answer of a completion matches the gold answer, 0.0 if it does not.

    math_answer_reward(["so 6*7 = \\boxed{42}", "#### 41"], answer=["42", "42"])  ->  [1.0, 0.0]

`final_answer.py` finds the final answer, and `answer.py` compares it with the gold answer. In short: 1/2, 0.5,
\frac12 and 50% are equal, and 50% is also equal to 50. "5 apples", "$5", "5 km" and "x = 5" are 5, "5 millions" is
5,000,000, and "20 June" is not "20 July". 1,000 is a thousand and 1.000 is one. 0.333 is not 1/3, 3.46 is not the
square root of 12, and 2^{100} is not 2^{100}-1. The same text as the gold answer scores 1.0 without parsing. The
following score 0.0:

- several candidates: `5 or 6`, `5, 6` (of several `\boxed{}`, the last one counts, unless they are separated only by
  "and" or "or")
- unevaluated arithmetic if the gold answer is a number: `737+844`, `48/2`, `2^{10}`
- an unsolved equation in one unknown, or a chain with a wrong step: `5x = 25` for x = 5, `x = 5 = 6`
- a copied question: an expression taken from the prompt word for word, unless the gold answer is written the same way

Known limits:

- Units are not compared: 5 km equals 5 m. Only months, points of the compass, am and pm, and moduli are; in a list, the
  names of things: 3 boys and 2 girls; and the units of an amount in several units: 2 hours 30 minutes is 150 minutes.
- A time of day without am, pm or a leading zero is also a ratio: 4:30 equals 2:15.
- Upper-case and lower-case letters are the same variable. `I` is imaginary if there is no other letter: 3+4I.
- A bare list is unordered: write the gold answer as (1, 2, 3) if the order matters.
- Products of three or more bare letters, such as `xyz`, are compared as words. So are `VI` and `no`.
- Numbers in two bases are compared by their digits and base: 101_2 is not 5_{10}.
- Unions of intervals must be split in the same way.
- Equations are equal up to a constant factor only: xy = 1 is not y = 1/x.
- An exact value together with a rounded one (`\sqrt{2} \approx 1.41`) counts as two candidates, unless the gold answer
  is written so.
- Roots of negative numbers are complex, including the cube root of -8.
- Variables are real numbers, so \cos(\pi n) is not (-1)^n. Degrees are numbers, so \sin(90^\circ-x) is not \cos(x).
- Systems of equations in a `cases` environment are compared as text.
- `\boxed 42` without braces, and a lone `= 42`, are not final answers.
- A fraction need not be in lowest terms, unless it was copied from the prompt.
- A gold answer that cannot be parsed matches the same text only. Completions that copy it from the prompt are not
  scored. The search covers the end of a prompt, 4,000 characters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from grpo_ext.rewards.completion import Completion, text_of
from grpo_ext.rewards.math.answer import (
    MAX_CHARACTERS,
    ParsedAnswer,
    Relation,
    answers_match,
    is_fully_evaluated,
    is_parseable,
    parse_answer,
)
from grpo_ext.rewards.math.final_answer import extract_final_answer
from grpo_ext.rewards.math.latex import normalize

MAX_PROMPT_CHARACTERS = 4000  # only the end of a prompt is searched for a copied question

_TOKEN = re.compile(r"\\?[A-Za-z]+|\d+|\S")
_LETTER = re.compile("[A-J]")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s))\s*(\S.*)")  # (C) 42
_NOTATION = re.compile(r"\\[A-Za-z]|[\^<>=!|_]")  # mathematics, unlike prose
_OPERATOR = re.compile(r"[-+*/^=<>]|\\(?:frac|sqrt|cdot|times|le|ge)")


@dataclass(frozen=True)
class MathAnswerReward:
    """A reward function with options. `math_answer_reward` is the one with the defaults.

    Args:
        strict: accept only answers in `\\boxed{}`, no other marker.
    """

    strict: bool = False
    # See `grpo_ext.rewards.workers.pool`. Only a separate process reliably bounds the run time of Math-Verify.
    scores_independently: ClassVar[bool] = True

    @property
    def __name__(self) -> str:
        """The name under which TRL logs the reward."""
        return "strict_math_answer_reward" if self.strict else "math_answer_reward"

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[object],
        prompts: Sequence[Completion] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Score completions by whether their final answer matches the gold answer.

        Args:
            completions: strings or chat completions, `[{"role": "assistant", "content": ...}]`. The last message of a
                chat completion counts.
            answer: one gold answer per completion: a bare answer, or a solution that marks its answer (gsm8k's
                `... #### 42`).
            prompts: the prompts as TRL passes them, to detect copied questions. None skips this check.
            columns: other columns of the data set, unused.

        Returns:
            One score per completion: 1.0 if right, 0.0 if wrong or without a final answer. If the gold answer cannot be
            parsed (see `check_gold`), the score is 1.0 for the same text, unless the prompt contains it, and None for
            any other.

        Raises:
            ValueError: the arguments differ in length.
        """
        prompt_texts = [""] * len(completions) if prompts is None else map(text_of, prompts)
        rows = zip(map(text_of, completions), answer, prompt_texts, strict=True)
        return [self._score(*row) for row in rows]

    def _score(self, text: str, gold: object, prompt: str) -> float | None:
        gold_text = _extract_gold(gold)
        expected = _parse_gold(_letter_of(gold_text))
        answer_text = extract_final_answer(text, boxed_only=self.strict) or ""
        if gold_text and _same_text(gold_text, answer_text):
            # A gold answer that has no meaning but its text would pay for copying the question.
            return 1.0 if _matches_itself(gold_text) or not _occurs_in(gold_text, prompt) else None
        if expected is None:
            return None
        if choice := _CHOICE.fullmatch(normalize(answer_text[:MAX_CHARACTERS])):
            answer_text = choice[1] if _LETTER.fullmatch(_letter_of(gold_text)) else choice[2]
        received = parse_answer(answer_text)
        if received is None or not answers_match(expected, received):
            return 0.0
        return (
            1.0 if is_fully_evaluated(received) or not _is_copied_from_prompt(answer_text, gold_text, prompt) else 0.0
        )


math_answer_reward = MathAnswerReward()


def check_gold(answer: Sequence[object]) -> list[int]:
    """Check before a run that every gold answer is one that its own text satisfies, in a box and in a sentence.

    Args:
        answer: the column `answer` of the data set.

    Returns:
        The rows, counted from 0, whose gold answer is mathematics that cannot be parsed, such as `f(2) < f(1)`. Only
        the same text earns 1.0 there.

    Raises:
        ValueError: some gold answers cannot be parsed or do not satisfy themselves; the message names their rows.
    """
    bad, only_as_text = [], []
    for row, gold in enumerate(answer):
        text = _extract_gold(gold)
        has_meaning = _matches_itself(text)
        if not all(_earns(form.format(text), gold) for form in (r"\boxed{{{}}}", "The answer is {}.")) or not (
            has_meaning or _NOTATION.search(normalize(text))
        ):
            bad.append(row)
        elif not has_meaning:
            only_as_text.append(row)
    if bad:
        shown = ", ".join(f"row {row}: {str(answer[row])[:60]!r}" for row in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(answer)} gold answers cannot be parsed (rows are counted from 0): {shown}"
            f"{', ...' if len(bad) > 5 else ''}. Valid: a number, an expression in LaTeX, a list or up to five words, "
            f"in one sentence, bare or marked as the last \\boxed{{...}}, <answer>...</answer> or #### ... of a "
            f"solution."
        )
    return only_as_text


def _earns(completion: str, gold: object) -> bool:
    return math_answer_reward([completion], answer=[gold]) == [1.0]


def _extract_gold(gold: object) -> str:
    text = "" if gold is None else str(gold)
    return extract_final_answer(text) or text.strip()


def _letter_of(gold: str) -> str:
    """The letter of a gold answer that is a choice with its text, `(C) Alice`; any other gold answer as it is."""
    choice = _CHOICE.fullmatch(gold)
    return choice[1] if choice else gold


def _same_text(gold: str, answer: str) -> bool:
    """Whether two short texts are the same after normalization. This needs no parsing: sets, chains, huge numbers."""
    if len(gold) > MAX_CHARACTERS or len(answer) > MAX_CHARACTERS:
        return False
    known, received = (_TOKEN.findall(normalize(text)) for text in (gold, answer))
    return bool(known) and known == received


def _occurs_in(text: str, prompt: str) -> bool:
    wanted, asked = (_TOKEN.findall(normalize(part)) for part in (text, prompt[-MAX_PROMPT_CHARACTERS:]))
    return any(asked[start : start + len(wanted)] == wanted for start in range(len(asked) - len(wanted) + 1))


def _matches_itself(gold: str) -> bool:
    """Whether the gold answer has a meaning that its own text or value satisfies. Others are compared only as text."""
    try:
        return _parsed_matches_itself(gold)
    except ValueError:
        return False


@lru_cache(maxsize=4096)
def _parsed_matches_itself(gold: str) -> bool:
    answer = _parse_readable_gold(_letter_of(gold))
    own = [answer, *(answer.values[-1:] if isinstance(answer, Relation) else ())]
    if not any(answers_match(answer, part) for part in own):
        raise ValueError(gold)  # not cached: it may be a timeout
    return True


def _parse_gold(gold: str) -> ParsedAnswer | None:
    try:
        return _parse_readable_gold(gold)
    except ValueError:
        return None


@lru_cache(maxsize=4096)  # the completions of a group share their gold answer
def _parse_readable_gold(gold: str) -> ParsedAnswer:
    """Raises if it cannot be parsed, so that the failure is not cached: it may be a timeout on a busy machine."""
    answer = parse_answer(gold)
    if answer is None or not is_parseable(answer):
        raise ValueError(gold)
    return answer


def _is_copied_from_prompt(answer: str, gold: str, prompt: str) -> bool:
    """Whether an answer with an operator occurs in the prompt, and not as part of a longer expression."""
    copied, known, asked = (_TOKEN.findall(normalize(text)) for text in (answer, gold, prompt[-MAX_PROMPT_CHARACTERS:]))
    if copied == known or not any(map(_OPERATOR.fullmatch, copied)):
        return False
    for start in range(len(asked) - len(copied) + 1):
        before, *here, after = ["", *asked, ""][start : start + len(copied) + 2]
        if here == copied and not re.fullmatch(r"[A-Za-z+*/^-]|\d+", before) and after not in ("+", "-", "*", "/", "^"):
            return True
    return False
