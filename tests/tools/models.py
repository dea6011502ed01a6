"""Small models with random weights, LoRA with a random B, and 4-bit quantization."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def random_lora(**changes: Any) -> LoraConfig:
    """LoRA with a random B: with the default B = 0, every gradient of A is 0, and KL and ratio are trivial."""
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | {"init_lora_weights": False, "lora_dropout": 0.0}
        | changes
    )


def small_shape(tokenizer: Any) -> dict[str, Any]:
    """Two layers of hidden size 32, for the config of any architecture."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    """A llama with random weights, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**small_shape(tokenizer)))
