"""How to load the policy: precision, quantisation and LoRA, from the fields of TRL's own `ModelConfig`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from trl import GRPOConfig, ModelConfig, get_quantization_config


@dataclass
class PolicyConfig(ModelConfig):
    """TRL's `ModelConfig` with other defaults: LoRA with r=16 and alpha=32 on every linear layer, without dropout.

    Changed defaults:
        use_peft: True. A full fine-tune with beta > 0 would need a second model for the reference.
        lora_dropout: 0.0, so that sampling and update see the same policy.
        lora_target_modules: `"all-linear"`, every linear layer except the LM head.
        use_bnb_nested_quant: True. `load_in_4bit` also quantises the quantisation constants, which saves 0.4 bits per
            weight.
        dtype: None, which means bfloat16 if the device supports it (see `frozen_dtype`).

    `--model` is short for `--model_name_or_path`.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model: a Hub id or a local folder.", "aliases": ["--model"]}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the frozen base; by default bfloat16 if the device supports it, float32 on a CPU.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter on a frozen base."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout; with 0, sampling and update use the same policy."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get an adapter; 'all-linear' means every linear layer except the LM head."},
    )
    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Double quantisation with load_in_4bit: also quantise its constants."}
    )


def frozen_dtype(args: GRPOConfig) -> torch.dtype:
    """Precision of the frozen base: that of the run's autocast, or float32 without autocast (on a CPU)."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def computes_in_float32(model: nn.Module) -> bool:
    """Whether every layer computes in float32 or float64 if there is no autocast. A 4-bit layer does if its
    `bnb_4bit_compute_dtype` is float32; other quantised layers compute in 16 bits."""
    dtypes = {
        module.compute_dtype if isinstance(module, Linear4bit) else parameter.dtype
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }
    return dtypes <= {torch.float32, torch.float64}


def model_init_kwargs(model_args: PolicyConfig, args: GRPOConfig) -> dict[str, object]:
    """Keyword arguments of `from_pretrained` for `GRPOExtConfig.model_init_kwargs`.

    A base that stays frozen under an adapter gets the precision of the run's autocast. A full fine-tune uses float32.
    Those that `args` already has are kept and take precedence, for example `{"use_kernels": True}`.
    """
    frozen = frozen_dtype(args) if model_args.use_peft else torch.float32
    dtype = model_args.dtype or str(frozen).removeprefix("torch.")
    kwargs: dict[str, object] = {"revision": model_args.model_revision, "dtype": dtype}
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    own: Any = args.model_init_kwargs  # a dict: the config has parsed a flag's JSON
    return kwargs | (own or {})


def quantization(model_args: PolicyConfig, args: GRPOConfig) -> BitsAndBytesConfig | None:
    """`load_in_4bit` / `load_in_8bit` as a bitsandbytes config that computes in the precision of the base."""
    config = get_quantization_config(model_args)
    if config is not None and model_args.load_in_4bit and model_args.dtype is None:
        config.bnb_4bit_compute_dtype = frozen_dtype(args)
    return config


def load_tokenizer(model_args: PolicyConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; checks that the model exists before any weight is loaded.

    Raises:
        SystemExit: the model is neither a local folder nor reachable on the Hub; the message says what to do.
    """
    name = model_args.model_name_or_path
    assert name is not None
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except OSError as error:
        raise SystemExit(unreachable_message("Model", name, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def unreachable_message(kind: str, name: str, error: BaseException) -> str:
    """The message for a model or data set that is neither on disk nor on a reachable Hub."""
    if Path(name).exists():
        return f"{kind} '{name}' is on disk but could not be read: {_first_line(error)}"
    return (
        f"{kind} '{name}' is not a local path and could not be fetched from the Hub. Check the name and the network, "
        f"or download it once while online; offline, `grpo-ext train math` runs the embedded model."
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def disable_4bit_repacking(model: nn.Module) -> None:
    """Keep 4-bit weights in the format to which they were quantised.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer when it first runs in evaluation mode, and rounds its
    constants to bfloat16. Evaluation and all later training would then use a different backbone from the one that
    training began with, and no gradient would pass through it.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
