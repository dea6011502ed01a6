"""Rewards for random text on the four prompts of the tests."""

from typing import Any

PROMPTS = ["Question: 1+2=?\nAnswer:", "Question: 30+41=?\nAnswer:", "2+2=", "Question: 7+8=?\nAnswer:"]


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    """The share of digits among the characters: a reward that varies between random texts."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def half_dead(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """`share_of_digits`, except that two of the four prompts always earn the same."""
    scores = share_of_digits(completions)
    return [0.5 if prompt in PROMPTS[:2] else score for prompt, score in zip(prompts, scores, strict=True)]


def likes_step_two(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """A reward that is highest in the evaluation after step 2."""
    return [1.0 / (1 + abs(trainer_state.global_step - 2))] * len(completions)
