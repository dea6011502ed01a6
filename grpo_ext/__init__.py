"""GRPO on one GPU: a plugin for TRL that trains a LoRA or QLoRA adapter.

The names below are imported on first use, so `import grpo_ext` loads neither torch nor TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_ext.algorithms import algorithm, overlong_punishment
    from grpo_ext.config import TRL_DEFAULTS, GRPOExtConfig
    from grpo_ext.evaluation.complete import evaluate
    from grpo_ext.rollout.dialogue import Dialogue, TextEnv, dialogue_reward
    from grpo_ext.trainer import GRPOExtTrainer

__all__ = [
    "TRL_DEFAULTS",
    "Dialogue",
    "GRPOExtConfig",
    "GRPOExtTrainer",
    "TextEnv",
    "algorithm",
    "dialogue_reward",
    "evaluate",
    "overlong_punishment",
]
__version__ = "0.2.0"

_MODULES = {
    "TRL_DEFAULTS": "grpo_ext.config",
    "Dialogue": "grpo_ext.rollout.dialogue",
    "GRPOExtConfig": "grpo_ext.config",
    "GRPOExtTrainer": "grpo_ext.trainer",
    "TextEnv": "grpo_ext.rollout.dialogue",
    "algorithm": "grpo_ext.algorithms",
    "dialogue_reward": "grpo_ext.rollout.dialogue",
    "evaluate": "grpo_ext.evaluation.complete",
    "overlong_punishment": "grpo_ext.algorithms",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # so that the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
