r"""Rewards that ignore the format that a prompt asks for, for evaluations that tell format from ability.

    lenient_math_reward(["So she pays 42 dollars."], answer=["42"])   ->  [1.0]     math_answer_reward: 0.0
    lenient_program_reward(["    return a + b\n"], prompts=["def add(a, b):\n"], ...)  ->  [1.0]

They are not for training: the last number of a text is often right by chance, and a model would learn to write many.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import unwrap
from itertools import takewhile
from typing import Any, ClassVar

from grpo_ext.rewards.code.program import ProgramReward
from grpo_ext.rewards.completion import Completion, text_of
from grpo_ext.rewards.math.answer_reward import MathAnswerReward
from grpo_ext.rewards.math.final_answer import TAIL_CHARACTERS, extract_final_answer

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class LenientMathReward:
    """Scores the marked final answer of a completion like `reward`, or its last number if no answer is marked."""

    reward: MathAnswerReward
    __name__ = "lenient_math_reward"
    scores_independently: ClassVar[bool] = True

    def __call__(
        self, completions: Sequence[Completion], answer: Sequence[object], **columns: Any
    ) -> list[float | None]:
        """One score per completion; for the arguments and the scores, see `MathAnswerReward`."""
        marked = [_with_marked_answer(text_of(completion)) for completion in completions]
        return self.reward(marked, answer, **columns)


@dataclass(frozen=True)
class LenientProgramReward:
    """Scores a program like `reward`, or the prompt continued by the completion if that scores less than 1.0.

    HumanEval asks for such a continuation: its prompts end with the signature and docstring of a function. The
    continuation ends before the first line that is not indented.
    """

    reward: ProgramReward
    __name__ = "lenient_program_reward"
    scores_independently: ClassVar[bool] = True
    runs_in_process: ClassVar[bool] = True

    def __call__(self, completions: list[Completion], prompts: list[Completion], **columns: Any) -> list[float | None]:
        """One score per completion; for the columns and the scores, see `ProgramReward`."""
        scores = self.reward(completions, **columns)
        failed = [row for row, score in enumerate(scores) if score is not None and score < 1.0]
        if not failed:
            return scores
        continued: list[Completion] = [
            _continuation(text_of(prompts[row]), text_of(completions[row])) for row in failed
        ]
        columns |= {
            name: [values[row] for row in failed]
            for name, values in columns.items()
            if isinstance(values, list) and len(values) == len(scores)  # unlike TRL's `trainer_state`
        }
        again = self.reward(continued, **columns)
        for row, score in zip(failed, again, strict=True):
            scores[row] = max(scores[row] or 0.0, score or 0.0)
        return scores


lenient_math_reward = LenientMathReward(MathAnswerReward())
lenient_program_reward = LenientProgramReward(ProgramReward())


def lenient_version(reward: Any) -> LenientMathReward | LenientProgramReward | None:
    """The reward that ignores the format demanded by this one; None if there is none."""
    reward = unwrap(reward)
    if isinstance(reward, MathAnswerReward):
        return LenientMathReward(MathAnswerReward())
    return LenientProgramReward(reward) if isinstance(reward, ProgramReward) else None


def _with_marked_answer(text: str) -> str:
    """The text, with a mark on its last number if it has no marked answer."""
    text = text[-TAIL_CHARACTERS:].rpartition("</think>")[2]
    numbers = _NUMBER.findall(text)
    if extract_final_answer(text) is not None or not numbers:
        return text
    return f"\\boxed{{{numbers[-1]}}}"


def _continuation(prompt: str, completion: str) -> str:
    lines = completion.splitlines(keepends=True)
    return prompt + "".join(takewhile(lambda line: not line.strip() or line[0].isspace(), lines))
