"""Checks a reward on a data set before a run: gold answers must get the full score, and common exploits must not.

    checks, timing = audit(math_answer_reward, rows, forms=ANSWER_FORMS)
    checks[0]  ->  Check(name="gold answers", expected="1.0", scores=[1.0, 1.0, ...], failed=[], is_fatal=True)

If an exploit gets the full score, the policy is likely to find it and to train on it from then on.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_ext.rewards.completion import text_of
from grpo_ext.rewards.math.final_answer import extract_final_answer

Row = dict[str, Any]

# How a completion may state its answer. Most checks use the first form; the reward must understand all of them.
ANSWER_FORMS = ("#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}.")
FILLER = "So let us think about it once more and go on step by step with what we know. "
PADDING_WORDS = (0, 50, 200, 1000)  # numbers of words in front of a wrong answer
LONG_CHARACTERS = 20_000
TOLERANCE = 1e-6


@dataclass
class Check:
    """The scores of one kind of completion.

    Attributes:
        name: the kind of completion.
        expected: the score that it should get, as text.
        scores: one per completion; None if the reward returned None.
        failed: (completion, score) pairs with any other score.
        is_fatal: whether a failure makes a run pointless.
    """

    name: str
    expected: str
    scores: list[float | None] = field(default_factory=list)
    failed: list[tuple[str, float | None]] = field(default_factory=list)
    is_fatal: bool = False


@dataclass
class Timing:
    """Seconds per completion."""

    mean: float
    slowest: float


def audit(
    reward: Callable[..., list[float | None]],
    rows: Sequence[Row],
    *,
    gold: str = "answer",
    forms: Sequence[str] = ANSWER_FORMS,
    seed: int = 0,
) -> tuple[list[Check], Timing]:
    """Audit a reward on some rows of a data set.

    Args:
        reward: a reward function with TRL's signature. It is called with one completion at a time.
        rows: rows of the data set, with `prompt` and the columns that the reward takes. At least 2; 50 are enough.
        gold: name of the column with the gold answers.
        forms: templates of correct completions, with `{}` for the gold answer. At least 1.
        seed: seed of the wrong answers.

    Returns:
        The checks in the order in which they ran, and the time taken by the reward.

    Raises:
        ValueError: fewer than two rows, no such column, or a form without `{}`.
    """
    if len(rows) < 2 or not all(gold in row for row in rows):
        raise ValueError(
            f"An audit needs two or more rows with the column {gold!r}; got {len(rows)} with the columns: "
            f"{', '.join(sorted(rows[0])) if rows else 'none'}."
        )
    if not forms or not all(map(_is_template, forms)):
        raise ValueError(
            f"forms={list(forms)!r}: each form needs a '{{}}' for the gold answer, as in '#### {{}}'; other braces are "
            f"doubled, as in {ANSWER_FORMS[1]!r}."
        )
    auditor = _Auditor(reward)
    form, rng = forms[0], random.Random(seed)
    golds = [str(row[gold]) for row in rows]
    parts = [_split_at_final_answer(text) for text in golds]
    finals = [final for _, final, _ in parts]
    wrong = [before + _perturbed(final, finals, rng) + after for before, final, after in parts]
    (common, _), *_ = Counter(finals).most_common(1)
    several = [
        before + " or ".join([*rng.sample(sorted(set(finals) - {final}), min(2, len(set(finals)) - 1)), final]) + after
        for before, final, after in parts
    ]
    checks = [
        auditor.expect_full_score("gold answers", rows, [form.format(text) for text in golds], is_fatal=True),
        *(
            auditor.expect_full_score(f"gold as {f.format('…')}", rows, [f.format(text) for text in golds])
            for f in forms[1:]
        ),
        auditor.expect_less("altered gold answers", rows, [form.format(text) for text in wrong]),
        auditor.expect_less("empty answers", rows, [""] * len(rows)),
        auditor.expect_less(
            "always the same answer",
            [row for row, final in zip(rows, finals, strict=True) if final != common],
            [form.format(common)] * sum(final != common for final in finals),
        ),
        auditor.expect_less("copied prompt", rows, [text_of(row.get("prompt", "")) for row in rows]),
        auditor.expect_less(
            "long text without an answer", rows, [FILLER * (LONG_CHARACTERS // len(FILLER))] * len(rows)
        ),
        auditor.expect_less(
            "several candidates",
            [row for row, text, own in zip(rows, several, golds, strict=True) if text != own],
            [form.format(text) for text, own in zip(several, golds, strict=True) if text != own],
        ),
        auditor.expect_no_length_bonus(rows, [form.format(text) for text in wrong]),
    ]
    return checks, Timing(sum(auditor.seconds) / len(auditor.seconds), max(auditor.seconds))


class _Auditor:
    def __init__(self, reward: Callable[..., list[float | None]]):
        self._reward = reward
        self.seconds: list[float] = []

    def score(self, row: Row, completion: str) -> float | None:
        """The score of one completion. It is passed as a chat completion if the prompt is a chat prompt."""
        is_chat = not isinstance(row.get("prompt", ""), str)
        message = [{"role": "assistant", "content": completion}] if is_chat else completion
        columns = {("prompts" if name == "prompt" else name): [value] for name, value in row.items()}
        started = time.perf_counter()
        (score,) = self._reward(completions=[message], **columns)
        self.seconds.append(time.perf_counter() - started)
        return score

    def expect_full_score(
        self, name: str, rows: Sequence[Row], completions: list[str], *, is_fatal: bool = False
    ) -> Check:
        check = Check(name, "1.0", is_fatal=is_fatal)
        return self._score_all(check, rows, completions, lambda score: score is not None and score >= 1.0 - TOLERANCE)

    def expect_less(self, name: str, rows: Sequence[Row], completions: list[str]) -> Check:
        check = Check(name, "below 1.0")
        return self._score_all(check, rows, completions, lambda score: score is None or score < 1.0 - TOLERANCE)

    def expect_no_length_bonus(self, rows: Sequence[Row], wrong: list[str]) -> Check:
        """Pad wrong answers: a row fails if padding raises the score. `scores` are those with the most padding."""
        check = Check("padded wrong answers", "no more than unpadded")
        words = FILLER.split()
        for row, answer in zip(rows, wrong, strict=True):
            texts = [" ".join([*(words * length)[:length], "\n" + answer]) for length in PADDING_WORDS]
            scores = [self.score(row, text) or 0.0 for text in texts]
            check.scores.append(scores[-1])
            best = max(range(len(texts)), key=lambda i: scores[i])
            if scores[best] > scores[0] + TOLERANCE:
                check.failed.append((texts[best], scores[best]))
        return check

    def _score_all(
        self, check: Check, rows: Sequence[Row], completions: list[str], passes: Callable[[float | None], bool]
    ) -> Check:
        for row, completion in zip(rows, completions, strict=True):
            score = self.score(row, completion)
            check.scores.append(score)
            if not passes(score):
                check.failed.append((completion, score))
        return check


def _is_template(form: str) -> bool:
    """Whether `{}` stands for the answer, not directly after a LaTeX command: `\\boxed{}` has braces of its own."""
    try:
        return form.format("x") != form.format("y") and not re.search(r"\\[A-Za-z]+\{\}", form)
    except (KeyError, IndexError, ValueError):  # {answer}, {1}, a lone brace
        return False


def _split_at_final_answer(gold: str) -> tuple[str, str, str]:
    """(text before, final answer, text after) of a solution that marks its answer; all other text is an answer."""
    before, final, after = gold.rpartition(extract_final_answer(gold) or gold or "?")
    return (before, final, after) if final else ("", gold, "")


def _perturbed(gold: str, golds: Sequence[str], rng: random.Random) -> str:
    """A wrong answer of the same kind: one digit changed, or the gold answer of another row."""
    places = [match.start() for match in re.finditer(r"\d", gold)]
    if places:
        place = rng.choice(places)
        return gold[:place] + rng.choice([d for d in "123456789" if d != gold[place]]) + gold[place + 1 :]
    others = sorted(set(golds) - {gold})
    return rng.choice(others) if others else gold + " not"
