"""LoRA on the LM head, which TRL refuses: its fused head multiplies with the head's weight and would leave it out.

Here `get_output_embeddings` of the model returns the frozen layer below the adapter. TRL then builds its trainer and
its fused head on that one, `engine/low_rank_head.py` adds what the adapter adds, and PEFT does not save the whole head
beside the adapter (it still says that it will). Where the head's weight is the embedding's, the embedding stays as it
is; `grpo-ext merge` unties the two, since a merge into the one weight would change both.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.trainer import grpo_trainer

from grpo_ext.model.unwrap import base_of, head_of


@contextmanager
def hide_head_adapter(model: PreTrainedModel | str) -> Iterator[None]:
    """Let `get_output_embeddings` of this model, or of those that TRL's trainer loads by name inside the context,
    return the head without its adapter, now or once there is one; for good, since PEFT asks when it saves."""
    if not isinstance(model, str):
        _show_frozen_head(base_of(model))
        yield
        return
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: _show_frozen_head(load(*args, **kwargs))
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load


def _show_frozen_head(lm: PreTrainedModel) -> PreTrainedModel:
    lm.get_output_embeddings = types.MethodType(_frozen_head, lm)
    return lm


def _frozen_head(lm: PreTrainedModel) -> nn.Module | None:
    head = head_of(lm)
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def has_head_adapter(model: PreTrainedModel) -> bool:
    return isinstance(head_of(base_of(model)), BaseTunerLayer)


def why_head_untrainable(model: PreTrainedModel, args: GRPOConfig) -> str | None:
    """The reason why the adapter on the LM head cannot be trained as asked, and what to use in its place; None where it
    can."""
    layer = head_of(base_of(model))
    if type(layer) is not Linear:
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"its layer is {kind}. Use LoRA on a head that is not quantised"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "it is more than a low-rank product. Use LoRA without use_dora, lora_bias and other variants"
    if any(parameter.requires_grad for parameter in layer.get_base_layer().parameters()):
        return 'the weight or the bias below it is trained, too. Use bias="none"'
    if layer.weight is not model.get_input_embeddings().weight:
        return None
    if any(config.ensure_weight_tying for config in model.peft_config.values()):
        return "ensure_weight_tying=True trains the embedding with the same factors. Use ensure_weight_tying=False"
    if args.use_vllm:
        return "use_vllm=True merges it into the head's weight, which is the embedding's, too. Use use_vllm=False"
    return None
