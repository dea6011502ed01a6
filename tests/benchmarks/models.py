"""Random models of one shape, a tokenizer for them, and completions of prescribed lengths. Does not import TRL."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from workloads import EOS, FIRST_WORD, PAD, Workload

SMALL_B = 0.1  # factor for PEFT's random B: the policy differs from its reference, but not wildly


def causal_lm(
    shape: dict[str, Any], seed: int, *, dtype: torch.dtype = torch.float32, load_in_4bit: bool = False
) -> PreTrainedModel:
    """A model with random weights, made on the GPU if there is one.

    Args:
        shape: fields of the config; `model_type` is "llama" if it is left out.
        load_in_4bit: quantise every linear layer but the LM head to NF4, as bitsandbytes does for a model from a file.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"model_type": "llama"} | shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if load_in_4bit:
        _quantize(lm, dtype)
    return lm


def _quantize(lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """One layer at a time, so that each frees its 16-bit weights before the next."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # not in the environment of compare_ppo.py

    linear = [
        (parent, name, layer)
        for parent in lm.base_model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    while linear:
        parent, name, layer = linear.pop()
        quantized = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = layer.weight.data
        quantized.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
        quantized.bias = layer.bias
        setattr(parent, name, quantized)
    lm.is_loaded_in_4bit = True


def scorer(shape: dict[str, Any], seed: int) -> LlamaForSequenceClassification:
    """A value or reward model: the same backbone with one number per token."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))


def random_lora() -> LoraConfig:
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        lora_dropout=0.0,
    )


def shrink_b(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(SMALL_B)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per id, `w2 w3 ...`: every id can be decoded, and text of n words has exactly n tokens."""
    words = {"<pad>": PAD, "</s>": EOS} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left", model_max_length=10**9
    )


def prompt_ids(steps: Sequence[Workload], vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of all steps, in the order of the steps."""
    draw = random.Random(seed)
    lengths = [length for step in steps for length in step.prompts]
    return [[draw.randrange(FIRST_WORD, vocabulary) for _ in range(length)] for length in lengths]


class FixedLengths(LogitsProcessor):
    """Row i gets EOS as token number `lengths[i]`, and not before; padding is never sampled."""

    def __init__(self, prompt_width: int, lengths: tuple[int, ...]):
        self.prompt_width, self.lengths = prompt_width, torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.size(0) == len(self.lengths), f"{input_ids.size(0)} rows for {len(self.lengths)} lengths"
        self.lengths = self.lengths.to(scores.device)  # once, as every copy waits for the device
        last = self.lengths <= input_ids.size(1) - self.prompt_width + 1
        scores = scores.masked_fill(last.unsqueeze(1), -torch.inf)
        scores[:, PAD] = -torch.inf
        scores[:, EOS] = torch.where(last, 0.0, -torch.inf).to(scores.dtype)
        return scores


def force_lengths(lm: PreTrainedModel, lengths: Iterable[tuple[int, ...]]) -> None:
    """Make each call of `lm.generate` sample completions of the next lengths; its arguments are passed on."""
    generate, lengths_of_calls = lm.generate, iter(lengths)

    def fixed(*args: Any, **kwargs: Any) -> Any:
        width = kwargs["input_ids"].size(1)
        kwargs.setdefault("logits_processor", LogitsProcessorList([FixedLengths(width, next(lengths_of_calls))]))
        return generate(*args, **kwargs)

    lm.generate = fixed
