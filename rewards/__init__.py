"""Rewards for checkable tasks, usable with any TRL trainer: `f(completions, **columns) -> list[float | None]`.

`None` means that the answer cannot be judged (its gold answer cannot be read), which GRPO leaves out of the group.
`rewards.logic` stands apart, since it needs reasoning-gym: `from rewards.logic import logic_problems, logic_reward`.
"""

from rewards.code.program import ProgramReward, program_reward
from rewards.math.reward import MathAnswerReward, check_gold, math_answer_reward
from rewards.text_shape import (
    CoherenceReward,
    FormatReward,
    LengthReward,
    coherence_reward,
    format_reward,
    length_reward,
)

__all__ = [
    "CoherenceReward",
    "FormatReward",
    "LengthReward",
    "MathAnswerReward",
    "ProgramReward",
    "check_gold",
    "coherence_reward",
    "format_reward",
    "length_reward",
    "math_answer_reward",
    "program_reward",
]
