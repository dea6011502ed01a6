"""Tiny random models of every supported architecture, with an adapter, TRL's fused head and shared scoring."""

from typing import Any

import torch
import transformers
from peft import get_peft_model
from trl.trainer.utils import add_fused_lm_head

from grpo_ext.engine.install import install_shared_scoring
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora

TEMPERATURE = 0.8
EOS, PAD = 1, 0
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
DELTA_RULE = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 40}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "falcon_h1": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 1.5},
    ),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "attn_pdrop": 0,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "logits_scaling": 0.5,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "qwen3_next": (
        "Qwen3Next",
        DELTA_RULE | {"num_experts": 0, "mlp_only_layers": [0, 1]},
    ),
    "qwen3_5_text": ("Qwen3_5Text", DELTA_RULE),
}
# Parts of these always run in float32: the scans of mamba and delta-rule layers, and experts on a CPU.
IN_FLOAT32 = ("falcon_h1", "granitemoehybrid", "qwen3_moe", "qwen3_next", "qwen3_5_text")

# Each architecture with each attention implementation that it has: gemma2 has no sdpa.
ATTENTIONS = [
    (architecture, attention)
    for architecture in ARCHITECTURES
    for attention in ("eager", "sdpa")
    if (architecture, attention) != ("gemma2", "sdpa")
]


def attentions(quick: list[tuple[str, str]]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: each architecture with each attention that it has if THOROUGH=1, otherwise
    with one of them, in turn, and those in `quick`. All others are slow."""
    one_each = {
        architecture: [case for case in ATTENTIONS if case[0] == architecture][i % 2 - 1]
        for i, architecture in enumerate(ARCHITECTURES)
        if architecture not in dict(quick)
    }
    chosen = [*quick, *one_each.values()]
    return slow_but(thinned(ATTENTIONS, [case for case in ATTENTIONS if case not in chosen]), quick)


def random_model(architecture, attention="eager", dtype=None, **settings):
    """A random model with an adapter, in float64 unless `dtype` is given. On a CPU, experts run only in float32.
    `settings` change its config."""
    name, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**TINY | changes | settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name.removesuffix('Text')}ForCausalLM")
    lm = getattr(transformers, class_name)(config)
    for parameter in lm.parameters():  # with the small initial weights, all distributions would be alike
        parameter.data += 0.05 * torch.randn_like(parameter)
    add_fused_lm_head(lm, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    install_shared_scoring(lm)
    lora = {"falcon_h1": ["q_proj", "v_proj", "in_proj", "up_proj"]}.get(architecture, "all-linear")
    model = get_peft_model(lm, random_lora(target_modules=lora))
    return model.to(dtype or (torch.float32 if architecture == "qwen3_moe" else torch.float64))
