"""Is a reward right on this data, before a run finds out: gold answers have to pass, and cheap tricks must not.

    checks = audit(math_answer_reward, rows, forms=FORMS)
    checks[0]  ->  Check(name="gold answers", wanted="1.0", scores=[1.0, 1.0, ...], failed=[])

A trick that earns the full reward once is found by the policy within a few steps, and trained on from there.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.completion import text_of

Row = dict[str, Any]

# How a completion may state its answer: the first is taken for most checks, and all of them have to be understood.
FORMS = ("#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}.")
FILLER = "So let us think about it once more and go on step by step with what we know. "
LENGTHS = (0, 50, 200, 1000)  # words in front of a wrong answer
LONG_CHARACTERS = 20_000
TOLERANCE = 1e-6


@dataclass
class Check:
    """What one kind of answer earned.

    Attributes:
        name: the kind of answer.
        wanted: what it should earn, in words.
        scores: one each; None where the reward did not judge.
        failed: of those that earned something else, the completion and the score.
        is_fatal: whether a run makes no sense where one failed.
    """

    name: str
    wanted: str
    scores: list[float | None] = field(default_factory=list)
    failed: list[tuple[str, float | None]] = field(default_factory=list)
    is_fatal: bool = False


@dataclass
class Seconds:
    """What judging took."""

    mean: float
    slowest: float


def audit(
    reward: Callable[..., list[float | None]],
    rows: Sequence[Row],
    *,
    gold: str = "answer",
    forms: Sequence[str] = FORMS,
    seed: int = 0,
) -> tuple[list[Check], Seconds]:
    """Put a reward to the test on some rows of the data.

    Args:
        reward: TRL's signature; called with one completion at a time.
        rows: of the data set, with `prompt` and the columns that the reward takes; two or more, 50 are enough.
        gold: the column from which a right completion is written.
        forms: how, `{}` standing for the gold answer; one or more.
        seed: of the wrong answers.

    Raises:
        ValueError: fewer than two rows, no such column, or a form without `{}`.
    """
    if len(rows) < 2 or not all(gold in row for row in rows):
        raise ValueError(
            f"An audit needs two or more rows with the column {gold!r}; got {len(rows)} with: "
            f"{', '.join(sorted(rows[0])) if rows else 'none'}."
        )
    if not forms or not all("x" in form.format("x") and form.format("x") != form.format("y") for form in forms):
        raise ValueError(f"forms={list(forms)!r} need a '{{}}' each, where the gold answer goes, as in '#### {{}}'.")
    judge = _Judge(reward)
    form, rng = forms[0], random.Random(seed)
    golds = [str(row[gold]) for row in rows]
    wrong = [_changed(text, golds, rng) for text in golds]
    (common, _), *_ = Counter(golds).most_common(1)
    others = [rng.sample(sorted(set(golds) - {text}), min(2, len(set(golds)) - 1)) for text in golds]
    checks = [
        judge.all_right("gold answers", rows, [form.format(text) for text in golds], is_fatal=True),
        *(judge.all_right(f"gold as {f.format('…')}", rows, [f.format(text) for text in golds]) for f in forms[1:]),
        judge.none_right("gold answers, changed", rows, [form.format(text) for text in wrong]),
        judge.none_right("empty answers", rows, [""] * len(rows)),
        judge.none_right(
            "always the same answer",
            [row for row, text in zip(rows, golds, strict=True) if text != common],
            [form.format(common)] * sum(text != common for text in golds),
        ),
        judge.none_right("the prompt copied", rows, [text_of(row.get("prompt", "")) for row in rows]),
        judge.none_right("very long, no answer", rows, [FILLER * (LONG_CHARACTERS // len(FILLER))] * len(rows)),
        judge.none_right(
            "several candidates",
            rows,
            [form.format(" or ".join([*more, text])) for text, more in zip(golds, others, strict=True)],
        ),
        judge.not_by_length(rows, [form.format(text) for text in wrong]),
    ]
    return checks, Seconds(sum(judge.seconds) / len(judge.seconds), max(judge.seconds))


class _Judge:
    def __init__(self, reward: Callable[..., list[float | None]]):
        self._reward = reward
        self.seconds: list[float] = []

    def score(self, row: Row, completion: str) -> float | None:
        """The reward of one completion; a chat prompt gets a chat completion."""
        is_chat = not isinstance(row.get("prompt", ""), str)
        answer = [{"role": "assistant", "content": completion}] if is_chat else completion
        columns = {("prompts" if name == "prompt" else name): [value] for name, value in row.items()}
        started = time.perf_counter()
        (score,) = self._reward(completions=[answer], **columns)
        self.seconds.append(time.perf_counter() - started)
        return score

    def all_right(self, name: str, rows: Sequence[Row], completions: list[str], *, is_fatal: bool = False) -> Check:
        check = Check(name, "1.0", is_fatal=is_fatal)
        return self._fill(check, rows, completions, lambda score: score is not None and score >= 1.0 - TOLERANCE)

    def none_right(self, name: str, rows: Sequence[Row], completions: list[str]) -> Check:
        check = Check(name, "below 1.0")
        return self._fill(check, rows, completions, lambda score: score is None or score < 1.0 - TOLERANCE)

    def not_by_length(self, rows: Sequence[Row], wrong: list[str]) -> Check:
        """The scores are those of the longest; it fails where one of these is better than the shortest."""
        check = Check("wrong, with more words", "no more than with fewer")
        words = FILLER.split()
        for row, answer in zip(rows, wrong, strict=True):
            texts = [" ".join([*(words * length)[:length], "\n" + answer]) for length in LENGTHS]
            scores = [self.score(row, text) or 0.0 for text in texts]
            check.scores.append(scores[-1])
            best = max(range(len(texts)), key=lambda i: scores[i])
            if scores[best] > scores[0] + TOLERANCE:
                check.failed.append((texts[best], scores[best]))
        return check

    def _fill(
        self, check: Check, rows: Sequence[Row], completions: list[str], passes: Callable[[float | None], bool]
    ) -> Check:
        for row, completion in zip(rows, completions, strict=True):
            score = self.score(row, completion)
            check.scores.append(score)
            if not passes(score):
                check.failed.append((completion, score))
        return check


def _changed(gold: str, golds: Sequence[str], rng: random.Random) -> str:
    """Another answer of the same kind: one digit changed, or the gold answer of another row."""
    places = [match.start() for match in re.finditer(r"\d", gold)]
    if places:
        place = rng.choice(places)
        return gold[:place] + rng.choice([d for d in "123456789" if d != gold[place]]) + gold[place + 1 :]
    others = sorted(set(golds) - {gold})
    return rng.choice(others) if others else gold + " not"
