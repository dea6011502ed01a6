r"""Rewards for the shape of a text, not for its correctness: tags, length, connectives.

    format_reward(["<think>6*7</think> <answer>42</answer>"])  ->  [1.0]
    length_reward(["word " * 40])                              ->  [0.8]
    coherence_reward(["因为下雨，所以带伞。"])                    ->  [0.4]

A model can earn each of them without solving anything, and it will find out: nonsense in perfect tags, fifty words of
filler, "因为因为因为因为因为". Use them in addition to a correctness reward, at a tenth of its weight:

    trainer = GRPOExtTrainer(reward_funcs=[math_answer_reward, format_reward],
                             args=GRPOExtConfig(reward_weights=[1.0, 0.1]), ...)

These three have the default settings. For other settings, use `LengthReward(target=200)` and so on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from grpo_ext.rewards.completion import Completion, text_of


@dataclass(frozen=True)
class FormatReward:
    """1.0 if a completion consists of exactly these tags, in order, each once and non-empty, with no text outside them.

    Args:
        tags: names of the tags; ("think", "answer") requires `<think>...</think><answer>...</answer>`.
        partial: give partial credit, for a model that never gets the whole format right. With n tags, each tag that is
            opened and closed once, in order and non-empty, is worth 1/(n+1). The rest is for the complete format.

    Raises:
        ValueError: no tags, repeated tags, or a tag that is not an identifier.
    """

    tags: tuple[str, ...] = ("think", "answer")
    partial: bool = False
    # See `grpo_ext.rewards.workers.pool`.
    scores_independently: ClassVar[bool] = True
    runs_in_process: ClassVar[bool] = True
    __name__ = "format_reward"  # TRL logs the reward under this name

    def __post_init__(self) -> None:
        if not self.tags or len(set(self.tags)) < len(self.tags) or not all(map(str.isidentifier, self.tags)):
            raise ValueError(f"tags={self.tags!r}; valid: one or more distinct names, such as ('think', 'answer').")

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """Score completions, strings or chat completions: one score in [0, 1] each."""
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
    """1.0 at the target length, decreasing linearly to 0.0 for an empty text and for twice the target.

    Args:
        target: target length in units, above 0.
        unit: "words", separated by white space, or "characters", without white space: for Chinese, Japanese and Thai,
            which do not separate words.

    Raises:
        ValueError: a target that is not above 0, or an unknown unit.
    """

    target: int = 50
    unit: str = "words"
    # See `grpo_ext.rewards.workers.pool`.
    scores_independently: ClassVar[bool] = True
    runs_in_process: ClassVar[bool] = True
    __name__ = "length_reward"  # TRL logs the reward under this name

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError(f"target={self.target}; valid: a length above 0, such as 50.")
        if self.unit not in ("words", "characters"):
            raise ValueError(f"unit={self.unit!r}; valid: 'words', 'characters'.")

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """Score completions, strings or chat completions: one score in [0, 1] each."""
        words = [text_of(completion).split() for completion in completions]
        lengths = [len(row) if self.unit == "words" else sum(map(len, row)) for row in words]
        return [max(0.0, 1 - abs(length - self.target) / self.target) for length in lengths]


@dataclass(frozen=True)
class CoherenceReward:
    """`each` per occurrence of a connective, at most 1.0. Repetitions count.

    Args:
        connectives: words to look for, ignoring case. Latin words must match as a whole: "so" is not found in "some".
        each: score per occurrence, in (0, 1].

    Raises:
        ValueError: no connectives, an empty one, or `each` out of range.
    """

    connectives: tuple[str, ...] = ("因为", "所以", "然而", "但是")
    each: float = 0.2
    # See `grpo_ext.rewards.workers.pool`.
    scores_independently: ClassVar[bool] = True
    runs_in_process: ClassVar[bool] = True
    __name__ = "coherence_reward"  # TRL logs the reward under this name

    def __post_init__(self) -> None:
        if not self.connectives or not all(self.connectives):
            raise ValueError(f"connectives={self.connectives!r}; valid: one or more words, such as ('because',).")
        if not 0 < self.each <= 1:
            raise ValueError(f"each={self.each}; valid: above 0, at most 1.")

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """Score completions, strings or chat completions: one score in [0, 1] each."""
        longest_first = sorted(self.connectives, key=len, reverse=True)
        words = "|".join(map(re.escape, longest_first))
        # A match is only part of a word if one of its boundaries has a Latin letter on both sides.
        pattern = re.compile(rf"(?:(?<![a-z])|(?![a-z]))(?:{words})(?:(?<![a-z])|(?![a-z]))", re.IGNORECASE)
        counts = [sum(1 for _ in pattern.finditer(text_of(completion))) for completion in completions]
        return [min(1.0, round(count * self.each, 9)) for count in counts]


format_reward = FormatReward()
length_reward = LengthReward()
coherence_reward = CoherenceReward()
