"""Reward functions for tasks whose answers can be checked. They work with any TRL trainer.

    math_answer_reward(["so 6*7 = \\boxed{42}"], answer=["42"])  ->  [1.0]

Every reward has TRL's signature, `f(completions, **columns) -> list[float | None]`: one score per completion, or None
if it cannot be scored, for example because its gold answer cannot be parsed. GRPO excludes such a completion from its
group. A reward never raises because of what a model wrote; bad data raise ValueError.

`isolated(reward)` runs any reward in worker processes, so that a hang or a crash does not end the run.

`grpo_ext.rewards.logic` is imported separately, since it needs reasoning-gym:
`from grpo_ext.rewards.logic import logic_problems, logic_reward`. The names below are imported on first use, so that a
worker process loads only what its reward needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_ext.rewards.code.program import ProgramReward, program_reward
    from grpo_ext.rewards.lenient import lenient_math_reward, lenient_program_reward
    from grpo_ext.rewards.math.answer_reward import MathAnswerReward, check_gold, math_answer_reward
    from grpo_ext.rewards.text_shape import (
        CoherenceReward,
        FormatReward,
        LengthReward,
        coherence_reward,
        format_reward,
        length_reward,
    )
    from grpo_ext.rewards.workers.pool import isolated

__all__ = [
    "CoherenceReward",
    "FormatReward",
    "LengthReward",
    "MathAnswerReward",
    "ProgramReward",
    "check_gold",
    "coherence_reward",
    "format_reward",
    "isolated",
    "length_reward",
    "lenient_math_reward",
    "lenient_program_reward",
    "math_answer_reward",
    "program_reward",
]

_MODULES = {
    "CoherenceReward": "grpo_ext.rewards.text_shape",
    "FormatReward": "grpo_ext.rewards.text_shape",
    "LengthReward": "grpo_ext.rewards.text_shape",
    "MathAnswerReward": "grpo_ext.rewards.math.answer_reward",
    "ProgramReward": "grpo_ext.rewards.code.program",
    "check_gold": "grpo_ext.rewards.math.answer_reward",
    "coherence_reward": "grpo_ext.rewards.text_shape",
    "format_reward": "grpo_ext.rewards.text_shape",
    "isolated": "grpo_ext.rewards.workers.pool",
    "length_reward": "grpo_ext.rewards.text_shape",
    "lenient_math_reward": "grpo_ext.rewards.lenient",
    "lenient_program_reward": "grpo_ext.rewards.lenient",
    "math_answer_reward": "grpo_ext.rewards.math.answer_reward",
    "program_reward": "grpo_ext.rewards.code.program",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # later accesses bypass this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
