"""The policy on the meta device: all modules, parameters and 4-bit constants, with shapes and dtypes but no data.

In: the policy that a run would load (`PolicyConfig`). Out: a PEFT model, and the bytes that its tensors would take.
Only the config of the model is loaded, from disk or from the Hub.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl import get_peft_config, get_quantization_config

from grpo_ext.model.load import PolicyConfig, disable_4bit_repacking, unreachable_message

ATTENTION = "sdpa"  # the default of transformers


def load_config(policy: PolicyConfig) -> PretrainedConfig:
    """Load the (text) config of the model.

    Raises:
        SystemExit: the model is neither a local folder nor reachable on the Hub; the message says what to do.
    """
    name = policy.model_name_or_path
    assert name is not None
    try:
        return AutoConfig.from_pretrained(name, revision=policy.model_revision).get_text_config()
    except OSError as error:
        raise SystemExit(unreachable_message("Model", name, error)) from None


def with_first_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of the same model with only its first layers."""
    truncated = copy.deepcopy(config)
    truncated.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        truncated.layer_types = config.layer_types[:layers]
    return truncated


def layer_period(config: PretrainedConfig) -> int:
    """The period, in layers, of the sequence of layer types; 1 if all layers have the same type."""
    kinds = getattr(config, "layer_types", None) or [""]
    return next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))


def build_meta_model(config: PretrainedConfig, policy: PolicyConfig, dtype: torch.dtype) -> PeftModel:
    """The policy on the meta device: the frozen base in `dtype` or in 4 bits, and its adapter in float32.

    Raises:
        ValueError: the policy is not LoRA on an unquantised or 4-bit base, or the model has experts that the adapter
            targets or that are in float32.
    """
    if not policy.use_peft or policy.load_in_8bit:
        raise ValueError(
            f"Plans only cover LoRA on a frozen base, unquantised or in 4 bits; got use_peft={policy.use_peft}, "
            f"load_in_8bit={policy.load_in_8bit}. Use use_peft=True, with or without load_in_4bit=True."
        )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    if policy.load_in_4bit:
        _quantize(lm, policy, dtype)
    with torch.device("meta"):
        model = get_peft_model(lm, get_peft_config(policy))
    _refuse_experts(model, policy, dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    disable_4bit_repacking(model)
    return model


def _refuse_experts(model: PeftModel, policy: PolicyConfig, dtype: torch.dtype) -> None:
    """Some operations of a mixture of experts cannot run on tensors without data."""
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError(
            f"Plans do not cover adapters on experts, which lora_target_modules={policy.lora_target_modules} and "
            f"lora_target_parameters={policy.lora_target_parameters} select. Plan an adapter on attention alone, for "
            f"example --lora_target_modules q_proj k_proj v_proj o_proj, or try the run with a recipe's --dry_run."
        )
    if dtype == torch.float32 and any("experts" in name and p.dim() == 3 for name, p in model.named_parameters()):
        raise ValueError(
            "Plans only cover a mixture of experts in 16 bits, got dtype=float32. Use --dtype bfloat16, or try the run "
            "with a recipe's --dry_run."
        )


def _quantize(lm: PreTrainedModel, policy: PolicyConfig, dtype: torch.dtype) -> None:
    quantization = get_quantization_config(policy)
    quantization.bnb_4bit_compute_dtype = dtype
    replace_with_bnb_linear(lm, get_keys_to_not_convert(lm), quantization)
    lm.is_loaded_in_4bit = lm.is_quantized = True
    # bitsandbytes caches its tables on the device of the first call, which must be the CPU.
    quantize_4bit(torch.zeros(1, 64), compress_statistics=True)
    for layer in lm.modules():
        if isinstance(layer, Linear4bit):
            packed, state = quantize_4bit(
                torch.empty(layer.weight.shape, dtype=dtype, device="meta"),
                compress_statistics=policy.use_bnb_nested_quant,
                quant_type=policy.bnb_4bit_quant_type,
            )
            layer.weight = Params4bit(
                packed,
                requires_grad=False,
                quant_state=state,
                compress_statistics=policy.use_bnb_nested_quant,
                quant_type=policy.bnb_4bit_quant_type,
                bnb_quantized=True,
            )


def bytes_by_kind(model: PeftModel) -> dict[str, int]:
    """Bytes of the frozen weights per storage format (`"bfloat16"`, `"nf4"` including its constants) and of the
    `"adapter"`. A weight that two modules share counts once."""
    sizes: defaultdict[str, int] = defaultdict(int)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        kind = "adapter" if parameter.requires_grad else str(parameter.dtype).removeprefix("torch.")
        if state is not None:
            kind = state.quant_type
            sizes[kind] += sum(constant.nbytes for constant in _constants(state))
        sizes[kind] += parameter.nbytes
    sizes["float32"] += sum(buffer.nbytes for buffer in model.buffers())
    return {kind: size for kind, size in sizes.items() if size}


def _constants(state: QuantState) -> Iterator[Tensor]:
    for value in (state.absmax, state.code, state.offset):
        if value is not None:
            yield value
    if state.nested:
        yield from _constants(state.state2)
