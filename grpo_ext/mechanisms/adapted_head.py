"""TRL's trainer with adapters on the LM head."""

from contextlib import nullcontext
from typing import Any

from torch import nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.shared_prompt import SharedPromptTrainer
from grpo_ext.model.lm_head_lora import has_head_adapter, hide_head_adapter, why_head_untrainable


class AdaptedHeadTrainer(SharedPromptTrainer):
    """`SharedPromptTrainer` with this difference:

    - LoRA on the LM head is trained, also where the head's weight is the embedding's: `model/lm_head_lora.py`. TRL
      raises.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        has_adapter = hasattr(model, "peft_config") or keywords.get("peft_config") is not None
        with hide_head_adapter(model) if has_adapter else nullcontext():
            super().__init__(model, reward_funcs, args, *rest, **keywords)
        self._adapts_head = has_head_adapter(self.model)
        if self._adapts_head:
            self._require_trainable_head()

    def _require_trainable_head(self) -> None:
        reason = why_head_untrainable(self.model, self.args)
        if reason is None and not self._shares_prompts:
            reason = (
                "it is where prompts are shared, and here they are not (the log says why, or share_prompt=False). Use "
                "share_prompt=True with a model and settings that allow it"
            )
        if reason is not None:
            raise ValueError(
                f"An adapter on the LM head cannot be trained here: {reason}, or leave the head out of target_modules."
            )
