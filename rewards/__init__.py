"""Rewards for checkable tasks, usable with any TRL trainer: `f(completions, **columns) -> list[float | None]`.

`None` means that the answer cannot be judged (its gold answer cannot be read), which GRPO leaves out of the group.
"""

from rewards.math_answer import math_answer_reward
from rewards.program import ProgramReward, program_reward

__all__ = ["ProgramReward", "math_answer_reward", "program_reward"]
