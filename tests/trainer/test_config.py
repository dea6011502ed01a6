"""The configuration: defaults of sequence-level GRPO, the device's precision, and refusals that suggest a fix."""

import re

import pytest
import torch
from trl import GRPOConfig

from grpo_ext import TRL_DEFAULTS, GRPOExtConfig


def config(tmp_path, **changes):
    return GRPOExtConfig(output_dir=str(tmp_path), **changes)


def test_defaults_of_sequence_level_grpo(tmp_path):
    args = config(tmp_path)
    assert (args.num_generations, args.temperature, args.beta, args.epsilon) == (8, 0.8, 0.1, 0.2)
    assert (args.learning_rate, args.entropy_coef, args.max_grad_norm) == (1e-5, 0.01, 0.5)
    assert (args.loss_type, args.scale_rewards, args.kl_estimator) == ("grpo_sequence", "population", "k3")
    assert args.disable_dropout
    assert args.dead_groups == "skip"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only for machines without an accelerator")
def test_a_machine_without_accelerator_runs_in_float32(tmp_path):
    """TRL's default is bf16 even on a CPU, where `GRPOConfig()` raises, and with use_cpu trains in bf16 autocast."""
    args = config(tmp_path)
    assert (args.use_cpu, args.bf16, args.fp16) == (True, False, False)
    assert config(tmp_path, bf16=True).bf16  # requested, so kept


def test_only_the_named_fields_differ_from_trl():
    ours, theirs = GRPOExtConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    assert set(ours) - set(theirs) == {
        "accept_changes",
        "chunk_tokens",
        "dead_groups",
        "dry_run",
        "guards",
        "kl_estimator",
        "kl_stop",
        "log_kl",
        "max_hours",
        "max_prompt_tokens",
        "max_resample_rounds",
        "num_generations_max",
        "overlong_prompts",
        "replay_fraction",
        "replay_max_age",
        "reward_timeout",
        "reward_workers",
        "share_prompt",
        "temperature_end",
        "temperature_entropy_target",
        "temperature_schedule",
    }
    changed = {name for name in theirs if ours[name].default != theirs[name].default}
    assert changed == {
        "loss_type",
        "scale_rewards",
        "temperature",
        "beta",
        "learning_rate",
        "entropy_coef",
        "max_grad_norm",
        "disable_dropout",
    }


SEQUENCE, POPULATION = {"loss_type": "grpo_sequence"}, {"scale_rewards": "population"}
IMPOSSIBLE = [
    ({"loss_type": "ppo"}, "loss_type='ppo'", "'grpo_sequence', 'grpo'"),
    ({"scale_rewards": "std"}, "scale_rewards='std'", "'population', 'group'"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'", "'k3'"),
    ({"kl_estimator": "k2", "loss_type": "dapo"}, "loss_type='dapo'", "kl_estimator='k3'"),
    ({"kl_estimator": "k1", "use_bias_correction_kl": False}, "kl_estimator='k1'", "kl_estimator='k2'"),
    ({"kl_estimator": "exact", "share_prompt": False}, "share_prompt=False", "share_prompt=True"),
    ({"max_resample_rounds": 0}, "max_resample_rounds=0", "at least 1"),
    ({"temperature_schedule": "cosine"}, "'cosine'", "'linear'"),
    ({"temperature_schedule": "linear"}, "temperature_end above 0", "got None"),
    (
        {"temperature_schedule": "entropy", "temperature_entropy_target": 0.0},
        "temperature_entropy_target above 0",
        "got 0.0",
    ),
    ({"temperature_end": 1.0}, "temperature_end=1.0", "temperature_schedule='linear'"),
    (
        {"temperature_schedule": "linear", "temperature_end": 1.0, "share_prompt": False},
        "share_prompt=True",
        "share_prompt=False",
    ),
    (
        {"temperature_schedule": "entropy", "temperature_entropy_target": 1.0, "use_adaptive_entropy": True}
        | {"loss_type": "grpo"},
        "use_adaptive_entropy=True",
        "Use one",
    ),
    ({"dead_groups": "drop"}, "dead_groups='drop'", "'keep', 'skip'"),
    (
        {"multi_objective_aggregation": "normalize_then_sum", **POPULATION},
        "'normalize_then_sum'",
        "scale_rewards='group'",
    ),
    ({"importance_sampling_level": "sequence", **SEQUENCE}, "importance_sampling_level='sequence'", "'token'"),
    ({"top_entropy_quantile": 0.2, **SEQUENCE}, "top_entropy_quantile=0.2", "top_entropy_quantile=1.0"),
    ({"use_adaptive_entropy": True, **SEQUENCE}, "use_adaptive_entropy=True", "loss_type='grpo'"),
    ({"chunk_tokens": 0}, "chunk_tokens=0", "at least 1"),
    ({"chunk_tokens": 64, "share_prompt": False}, "chunk_tokens=64", "share_prompt=True"),
    ({"num_generations_max": 8}, "num_generations_max=8", "num_generations=8, for example 16"),
    ({"num_generations_max": 16, "scale_rewards": "group"}, "scale_rewards='group'", "scale_rewards='population'"),
    ({"num_generations_max": 16, "share_prompt": False}, "num_generations_max=16", "share_prompt=True"),
    ({"replay_fraction": 1.5}, "replay_fraction=1.5", "between 0 and 1"),
    ({"replay_max_age": 0}, "replay_max_age=0", "at least 1"),
    ({"replay_fraction": 0.5, "share_prompt": False}, "share_prompt=False", "share_prompt=True"),
    ({"replay_fraction": 0.5, "top_k": 20}, "top_k=20", "top_k=0"),
    ({"replay_fraction": 0.5, "top_p": 0.9}, "top_p=0.9", "top_p=1.0"),
    ({"replay_fraction": 0.5, "generation_kwargs": {"min_p": 0.1}}, "min_p=0.1", "min_p=None"),
    ({"replay_fraction": 0.5, "repetition_penalty": 1.1}, "repetition_penalty=1.1", "repetition_penalty=1.0"),
    ({"reward_timeout": 0.0}, "reward_timeout=0.0", "above 0"),
    ({"overlong_prompts": "cut"}, "overlong_prompts='cut'", "'error', 'drop'"),
    ({"max_prompt_tokens": 0}, "max_prompt_tokens=0", "1 or more, for example 512"),
    ({"dry_run": True, "guards": False}, "dry_run=True", "guards=True"),
    ({"kl_stop": 0.0}, "kl_stop=0.0", "above 0"),
    ({"kl_stop": 0.5, "beta": 0.0}, "kl_stop=0.5", "log_kl=True"),
    ({"kl_stop": 0.5, "guards": False}, "guards=False", "guards=True"),
    ({"num_generations": 1}, "num_generations=1", "2 or more; 8 is usual"),
    (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        "needs a rollout batch that is a multiple of 8, got 12 (batch 4 x accumulation 3 x 1 process)",
        "Nearest: gradient_accumulation_steps=2 or 4.",
    ),
    (
        {"per_device_train_batch_size": 2, "steps_per_generation": 3, "gradient_accumulation_steps": 4},
        "got 6 (batch 2 x steps per generation 3 x 1 process)",
        "Nearest: steps_per_generation=4.",
    ),
    ({"reward_workers": -1}, "reward_workers=-1", "0 (the training process itself)"),
    ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask", **SEQUENCE}, "'token_mask'", "'sequence_mask'"),
]


@pytest.mark.parametrize(("changes", "received", "valid"), IMPOSSIBLE)
def test_impossible_combinations_are_refused_by_name(tmp_path, changes, received, valid):
    with pytest.raises(ValueError, match=re.escape(received) + ".*" + re.escape(valid)):
        config(tmp_path, **changes)


# Non-default values of TRL's options that need no other option.
NOT_DEFAULT = {
    "learning_rate": 1e-4,
    "gradient_checkpointing": False,
    "router_aux_loss_coef": 0.01,
    "cast_lm_head_to_fp32": True,
    "shuffle_dataset": False,
    "pad_to_multiple_of": 8,
    "generation_batch_size": 16,
    "steps_per_generation": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "cache_implementation": "static",
    "use_vllm": True,
    "beta": 0.0,
    "num_iterations": 2,
    "epsilon": 0.1,
    "delta": 1.5,
    "epsilon_high": 0.3,
    "importance_sampling_level": "sequence",
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "none",
    "mask_truncated_completions": True,
    "sync_ref_model": True,
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": True,
    "max_tool_calling_iterations": 3,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_mask",
    "off_policy_mask_threshold": 0.5,
    "use_bias_correction_kl": False,
    "log_completions": True,
    "use_transformers_continuous_batching": True,
    "torch_compile": True,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
}
YIELDING = [
    ({"use_adaptive_entropy": True}, "loss_type"),
    ({"top_entropy_quantile": 0.2}, "loss_type"),
    ({"importance_sampling_level": "sequence"}, "loss_type"),
    ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}, "loss_type"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "scale_rewards"),
]


@pytest.mark.parametrize(("option", "default"), YIELDING)
def test_a_default_yields_to_an_option_of_trl(tmp_path, caplog, option, default):
    """Guards against refusing an option because of a default that the user did not set."""
    args = config(tmp_path, **option)
    assert getattr(args, default) == GRPOConfig.__dataclass_fields__[default].default
    assert f"{default} is TRL's default" in caplog.text
    (name,) = set(option) - {"use_vllm"}
    assert f"{name}={option[name]!r}" in caplog.text


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_every_single_option_of_trl_is_accepted(tmp_path, name):
    """On its own, with our defaults for everything else."""
    assert getattr(config(tmp_path, **{name: NOT_DEFAULT[name]}), name) == NOT_DEFAULT[name]


def test_what_differs_from_trl_is_listed(tmp_path):
    """Each difference shows both values. With TRL's own values, there is nothing to list."""
    listed = config(tmp_path).changed_defaults()
    assert [text.partition("=")[0] for text in listed if "bf16" not in text] == list(TRL_DEFAULTS)
    assert "beta=0.1 (TRL: 0.0)" in listed
    assert config(tmp_path, **TRL_DEFAULTS | {"bf16": True}).changed_defaults() == []
    assert not any(text.startswith("beta") for text in config(tmp_path, beta=0.2).changed_defaults())


@pytest.mark.parametrize("option", [{"importance_sampling_level": "sequence"}, {"top_entropy_quantile": 0.2}])
def test_options_of_trl_pass_with_losses_of_trl(tmp_path, option):
    assert config(tmp_path, loss_type="grpo", **option).loss_type == "grpo"
    assert config(tmp_path, scale_rewards=False).scale_rewards == "none"  # TRL's old spelling
