"""Reward functions for tasks whose answers can be checked. They work with any TRL trainer.

    math_answer_reward(["so 6*7 = \\boxed{42}"], answer=["42"])  ->  [1.0]

Every reward has TRL's signature, `f(completions, **columns) -> list[float | None]`: one score per completion, or None
if it cannot be scored, for example because its gold answer cannot be parsed. GRPO excludes such a completion from its
group. A reward never raises because of what a model wrote; bad data raise ValueError.

`rewards.logic` is imported separately, since it needs reasoning-gym:
`from rewards.logic import logic_problems, logic_reward`.
"""

from rewards.code.program import ProgramReward, program_reward
from rewards.math.answer_reward import MathAnswerReward, check_gold, math_answer_reward
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
