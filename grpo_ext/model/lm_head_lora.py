"""LoRA on the LM head. TRL refuses it, because its fused head uses the weight of the head and ignores any adapter.

Here, `get_output_embeddings` of the model returns the frozen layer below the adapter. TRL builds its trainer and fused
head on that layer, and `engine/lm_head.py` adds the adapter's share of the logits. PEFT does not save the whole head
with the adapter, although it logs that it will. If the weight of the head is tied to the embedding, the embedding does
not change. `grpo-ext merge` unties the two, because merging into the shared weight would change both.
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
    """Make `get_output_embeddings` return the LM head without its adapter, even if the adapter is added later.

    This affects the given model, or every model that TRL's trainer loads by name inside the context. It outlasts the
    context, because PEFT also calls `get_output_embeddings` when it saves.
    """
    if not isinstance(model, str):
        _hide_adapter(base_of(model))
        yield
        return
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: _hide_adapter(load(*args, **kwargs))
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load


def _hide_adapter(lm: PreTrainedModel) -> PreTrainedModel:
    lm.get_output_embeddings = types.MethodType(_head_without_adapter, lm)
    return lm


def _head_without_adapter(lm: PreTrainedModel) -> nn.Module | None:
    head = head_of(lm)
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def has_head_adapter(model: PreTrainedModel) -> bool:
    return isinstance(head_of(base_of(model)), BaseTunerLayer)


def why_head_untrainable(model: PreTrainedModel, args: GRPOConfig) -> str | None:
    """The reason why the adapter on the LM head cannot be trained with these settings, and what to use instead; None if
    it can."""
    layer = head_of(base_of(model))
    if type(layer) is not Linear:
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"its layer is {kind}. Use LoRA on a head that is not quantised"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "it is more than a low-rank product. Use LoRA without use_dora, lora_bias or other variants"
    if any(parameter.requires_grad for parameter in layer.get_base_layer().parameters()):
        return 'the weight or bias of its base layer is also trained. Use bias="none"'
    if layer.weight is not model.get_input_embeddings().weight:
        return None
    if any(config.ensure_weight_tying for config in model.peft_config.values()):
        return "ensure_weight_tying=True trains the embedding with the same factors. Use ensure_weight_tying=False"
    if args.use_vllm:
        return "use_vllm=True merges it into the head's weight, which the embedding shares. Use use_vllm=False"
    return None
