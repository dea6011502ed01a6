r"""Rewards for the shape of a text, not for its truth: tags, length, connectives.

    format_reward(["<think>6*7</think> <answer>42</answer>"])  ->  [1.0]
    length_reward(["word " * 40])                              ->  [0.8]
    coherence_reward(["因为下雨，所以带伞。"])                    ->  [0.4]

Each of them can be earned without solving anything, and a model finds that out: nonsense in perfect tags, fifty words
of nothing, "因为因为因为因为因为". They belong beside a reward for being right, at a tenth or a fifth of its weight:

    trainer = GRPOExtTrainer(reward_funcs=[math_answer_reward, format_reward],
                             args=GRPOExtConfig(reward_weights=[1.0, 0.1]), ...)

The three names are the defaults; `LengthReward(target=200)` and so on are the same with other settings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.completion import Completion, text_of


@dataclass(frozen=True)
class FormatReward:
    """1.0 where a completion is these tags in their order, once each, with something in each and nothing around them.

    Args:
        tags: names of the tags; ("think", "answer") asks for `<think>...</think><answer>...</answer>`.
        partial: pay for a part, too. Of n tags each one that is opened and closed once, in this order, with something
            inside, is worth 1/(n+1); the last share is for the whole. For a model that never gets all of it right.
    """

    tags: tuple[str, ...] = ("think", "answer")
    partial: bool = False
    needs_no_worker: ClassVar[bool] = True  # see `rewards.workers.pool`

    def __post_init__(self) -> None:
        if not self.tags or len(set(self.tags)) < len(self.tags) or not all(map(str.isidentifier, self.tags)):
            raise ValueError(f"tags={self.tags!r}; valid: one or more different names, such as ('think', 'answer').")

    @property
    def __name__(self) -> str:
        """What TRL logs it as."""
        return "format_reward"

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """A score in [0, 1] for each string or chat completion."""
        return [self._score(text_of(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        earned, place, outside = 0, 0, ""
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            start, end = text.find(opening), text.find(closing)
            once = text.count(opening) == text.count(closing) == 1
            if once and place <= start and text[start + len(opening) : end].strip():
                earned += 1
                outside += text[place:start]
                place = end + len(closing)
        if earned == len(self.tags) and not (outside + text[place:]).strip():
            return 1.0
        return earned / (len(self.tags) + 1) if self.partial else 0.0


@dataclass(frozen=True)
class LengthReward:
    """1.0 at `target`, falling in a straight line to 0.0 at nothing and at twice the target.

    Args:
        target: the length to aim at, in units; above 0.
        unit: "words", what stands between blanks, or "characters", blanks left out: for Chinese, Japanese and Thai,
            which put none between words.
    """

    target: int = 50
    unit: str = "words"
    needs_no_worker: ClassVar[bool] = True  # see `rewards.workers.pool`

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError(f"target={self.target}; valid: a length above 0, such as 50.")
        if self.unit not in ("words", "characters"):
            raise ValueError(f"unit={self.unit!r}; valid: 'words', 'characters'.")

    @property
    def __name__(self) -> str:
        """What TRL logs it as."""
        return "length_reward"

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """A score in [0, 1] for each string or chat completion."""
        words = [text_of(completion).split() for completion in completions]
        lengths = [len(row) if self.unit == "words" else sum(map(len, row)) for row in words]
        return [max(0.0, 1 - abs(length - self.target) / self.target) for length in lengths]


@dataclass(frozen=True)
class CoherenceReward:
    """`each` for every occurrence of a connective, at most 1.0; the same one twice counts twice.

    Args:
        connectives: what to look for, without regard to case; where one begins or ends in a Latin letter, a whole word:
            "so" is not found in "some".
        each: what an occurrence is worth, in (0, 1].
    """

    connectives: tuple[str, ...] = ("因为", "所以", "然而", "但是")
    each: float = 0.2
    needs_no_worker: ClassVar[bool] = True  # see `rewards.workers.pool`

    def __post_init__(self) -> None:
        if not self.connectives or not all(self.connectives):
            raise ValueError(f"connectives={self.connectives!r}; valid: one or more words, such as ('because',).")
        if not 0 < self.each <= 1:
            raise ValueError(f"each={self.each}; valid: above 0, at most 1.")

    @property
    def __name__(self) -> str:
        """What TRL logs it as."""
        return "coherence_reward"

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """A score in [0, 1] for each string or chat completion."""
        longest_first = sorted(self.connectives, key=len, reverse=True)
        words = "|".join(map(re.escape, longest_first))
        # A Latin letter on both sides of an edge means that the word goes on.
        pattern = re.compile(rf"(?:(?<![a-z])|(?![a-z]))(?:{words})(?:(?<![a-z])|(?![a-z]))", re.IGNORECASE)
        counts = [sum(1 for _ in pattern.finditer(text_of(completion))) for completion in completions]
        return [min(1.0, round(count * self.each, 9)) for count in counts]


format_reward = FormatReward()
length_reward = LengthReward()
coherence_reward = CoherenceReward()
