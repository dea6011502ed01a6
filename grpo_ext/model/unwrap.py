"""The causal language model inside PEFT's wrapper, and its LM head."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_of(lm: PreTrainedModel) -> nn.Module | None:
    """The LM head, or the adapter's layer on it, even if `lm.get_output_embeddings` hides that layer."""
    return type(lm).get_output_embeddings(lm)
