"""GRPO for one consumer GPU: a plugin for TRL with LoRA/QLoRA on one frozen backbone."""

from grpo_ext.config import GRPOExtConfig
from grpo_ext.trainer import GRPOExtTrainer

__all__ = ["GRPOExtConfig", "GRPOExtTrainer"]
__version__ = "0.1.0"
