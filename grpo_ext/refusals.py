"""Refuse settings that cannot be trained as requested; each message gives the value received and a valid one.

`refuse_impossible` runs before a model is loaded. The public functions below it run once the trainer is built.
"""

import math
from collections.abc import Sequence
from typing import Any

from grpo_ext.losses.kl import KL_ESTIMATORS
from grpo_ext.losses.temperature import TEMPERATURE_SCHEDULES

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
DEAD_GROUPS = ("keep", "skip", "resample")
CURRICULA = ("off", "pools")
OVERLONG_PROMPTS = ("error", "drop")
TRL_SCALE_REWARDS = ("group", "batch", "none")
# Values of sampling options that leave the distribution over tokens untruncated.
UNTRUNCATED = {"top_k": (0, None), "top_p": (1.0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def refuse_impossible(config: Any) -> None:
    """Raise ValueError if the settings of a `GRPOExtConfig` cannot be combined."""
    _require("loss_type", config.loss_type, ("grpo_sequence", *TRL_LOSS_TYPES))
    _require("scale_rewards", config.scale_rewards, ("population", *TRL_SCALE_REWARDS))
    _require("kl_estimator", config.kl_estimator, KL_ESTIMATORS)
    _require("dead_groups", config.dead_groups, DEAD_GROUPS)
    _require("curriculum", config.curriculum, CURRICULA)
    _require("temperature_schedule", config.temperature_schedule, TEMPERATURE_SCHEDULES)
    _require("overlong_prompts", config.overlong_prompts, OVERLONG_PROMPTS)
    if config.scale_rewards == "population" and config.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"scale_rewards='population' normalises the summed reward, so it cannot be combined with "
            f"multi_objective_aggregation={config.multi_objective_aggregation!r}. Use 'sum_then_normalize', or "
            f"scale_rewards='group'."
        )
    is_number = isinstance(config.chunk_tokens, int)
    if config.chunk_tokens not in (None, "auto") and (not is_number or config.chunk_tokens < 1):
        raise ValueError(
            f"chunk_tokens={config.chunk_tokens!r} must be at least 1, for example 4096, or 'auto', or None."
        )
    if is_number and not config.share_prompt:
        raise ValueError(
            f"chunk_tokens={config.chunk_tokens} limits shared scoring, but share_prompt=False selects TRL's plain "
            f"path. Use share_prompt=True, or chunk_tokens=None."
        )
    if config.max_resample_rounds < 1:
        raise ValueError(f"max_resample_rounds={config.max_resample_rounds} must be at least 1, for example 3.")
    if config.loss_type == "grpo_sequence":
        _refuse_token_options(config)
    _refuse_kl_estimators(config)
    _refuse_temperatures(config)
    _refuse_growth(config)
    _refuse_replay(config)
    if config.max_hours is not None and config.max_hours <= 0:
        raise ValueError(f"max_hours={config.max_hours} must be above 0 hours, for example 3.5, or None.")
    if config.start_pass_rates is not None and config.curriculum == "off":
        raise ValueError(
            f"start_pass_rates={config.start_pass_rates!r} needs curriculum='pools', got 'off'. Set that curriculum, "
            f"or leave start_pass_rates out."
        )
    if config.reward_timeout <= 0:
        raise ValueError(f"reward_timeout={config.reward_timeout} must be above 0 seconds, for example 10.")
    if config.reward_workers is not None and config.reward_workers < 0:
        raise ValueError(
            f"reward_workers={config.reward_workers} must be 0 (the training process itself) or more, for example 2, "
            f"or None."
        )
    _refuse_guards(config)


def refuse_words(config: Any) -> None:
    """Refuse `num_generations="auto"` outside of a recipe, before TRL computes with it."""
    if isinstance(config.num_generations, str):
        raise ValueError(
            f"num_generations={config.num_generations!r} must be a number of 2 or more, for example 8. Only recipes "
            f"accept `auto`, as a flag or in their YAML file. For your own script, run `grpo-ext plan`."
        )


def _refuse_guards(config: Any) -> None:
    if config.max_prompt_tokens is not None and config.max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens={config.max_prompt_tokens} must be 1 or more, for example 512, or None.")
    if config.dry_run and not config.guards:
        raise ValueError("dry_run=True runs the checks that guards=False turns off. Use guards=True.")
    if config.kl_stop is not None and config.kl_stop <= 0:
        raise ValueError(f"kl_stop={config.kl_stop} must be above 0 nats per token, for example 0.5, or None.")
    if config.kl_stop is not None and config.beta == 0.0 and not config.log_kl:
        raise ValueError(
            f"kl_stop={config.kl_stop} needs a KL to watch, and with beta=0 there is none. Use log_kl=True, or "
            f"kl_stop=None."
        )
    if config.kl_stop is not None and not config.guards:
        raise ValueError(
            f"kl_stop={config.kl_stop} is one of the guards, and guards=False turns it off. Use guards=True."
        )


def explain_batch(config: Any) -> str | None:
    """The error in `num_generations` or the rollout batch, if there is one. Called after TRL has derived the batch."""
    group, rollout = config.num_generations, config.generation_batch_size
    if group < 2:
        return f"num_generations={group} gives a completion nothing to be compared with. Use 2 or more; 8 is usual."
    steps = config.steps_per_generation
    if rollout is None or steps is None or rollout % group == 0:
        return None
    batch, processes = config.per_device_train_batch_size, config.world_size
    name = "gradient_accumulation_steps" if steps == config.gradient_accumulation_steps else "steps_per_generation"
    step = math.lcm(group, batch * processes) // (batch * processes)
    valid = [n for n in (steps // step * step, (steps // step + 1) * step) if n]
    return (
        f"num_generations={group} needs a rollout batch that is a multiple of {group}, got {rollout} (batch {batch} x "
        f"{'accumulation' if name.startswith('gradient') else 'steps per generation'} {steps} x {processes} "
        f"process{'es' if processes > 1 else ''}). Nearest: {name}={' or '.join(map(str, valid))}."
    )


def token_option(config: Any) -> tuple[str, Any, str] | None:
    """The first option set that acts on single tokens: its name, its value, and the value that a sequence-level loss
    allows."""
    neutral = {"importance_sampling_level": "token", "top_entropy_quantile": 1.0, "use_adaptive_entropy": False}
    for name, valid in neutral.items():
        if getattr(config, name) != valid:
            return name, getattr(config, name), repr(valid)
    mode = config.vllm_importance_sampling_mode
    if config.use_vllm and config.vllm_importance_sampling_correction and not mode.startswith("sequence"):
        return "vllm_importance_sampling_mode", mode, "'sequence_mask' or 'sequence_truncate'"
    return None


def _refuse_token_options(config: Any) -> None:
    option = token_option(config)
    if option is not None:
        name, received, valid = option
        raise ValueError(
            f"{name}={received!r} acts on single tokens, but loss_type='grpo_sequence' has one ratio per completion. "
            f"Use {name}={valid}, or one of TRL's losses, such as loss_type='grpo'."
        )


def _refuse_kl_estimators(config: Any) -> None:
    if config.kl_estimator != "k3" and config.loss_type not in ("grpo_sequence", "grpo"):
        raise ValueError(
            f"kl_estimator={config.kl_estimator!r} works with loss_type='grpo_sequence' and 'grpo' only; "
            f"loss_type={config.loss_type!r} uses TRL's own KL. Use kl_estimator='k3'."
        )
    if config.kl_estimator == "k1" and config.beta != 0.0 and not config.use_bias_correction_kl:
        raise ValueError(
            f"kl_estimator='k1' with beta={config.beta} and use_bias_correction_kl=False would not keep the policy "
            f"close to the reference: the expected gradient of that term is zero. Use use_bias_correction_kl=True, or "
            f"kl_estimator='k2'."
        )
    if config.kl_estimator == "exact" and not config.share_prompt:
        raise ValueError(
            "kl_estimator='exact' is computed by shared scoring, but share_prompt=False selects TRL's plain path. "
            "Use share_prompt=True, or kl_estimator='k3'."
        )


def _refuse_temperatures(config: Any) -> None:
    schedule = config.temperature_schedule
    needs = {"linear": "temperature_end", "entropy": "temperature_entropy_target"}
    for of, name in needs.items():
        value = getattr(config, name)
        if schedule == of and (value is None or value <= 0):
            raise ValueError(f"temperature_schedule={schedule!r} needs {name} above 0, got {value}.")
        if schedule != of and value is not None:
            raise ValueError(
                f"{name}={value} needs temperature_schedule={of!r}, got {schedule!r}. Set that schedule, or leave "
                f"{name} out."
            )
    if schedule == "entropy" and config.use_adaptive_entropy:
        raise ValueError(
            "temperature_schedule='entropy' and use_adaptive_entropy=True would both control the entropy. Use one of "
            "them."
        )
    if schedule != "constant" and not config.share_prompt:
        raise ValueError(
            f"temperature_schedule={schedule!r} needs share_prompt=True: TRL's plain scoring, share_prompt=False, "
            f"supports only one temperature."
        )


def _refuse_growth(config: Any) -> None:
    most = config.num_generations_max
    if most is None:
        return
    if most <= config.num_generations:
        raise ValueError(
            f"num_generations_max={most} must be more than num_generations={config.num_generations}, for example "
            f"{2 * config.num_generations}, or None."
        )
    if config.scale_rewards != "population":
        raise ValueError(
            f"num_generations_max={most} needs the mean and standard deviation of all sampled completions, but "
            f"scale_rewards={config.scale_rewards!r} is computed by TRL, from the trained completions only. Use "
            f"scale_rewards='population'."
        )
    if not config.share_prompt:
        raise ValueError(
            f"num_generations_max={most} needs the KV caches that shared sampling keeps, but share_prompt=False "
            f"selects TRL's plain path. Use share_prompt=True, or num_generations_max=None."
        )


def _refuse_replay(config: Any) -> None:
    if not 0 <= config.replay_fraction <= 1:
        raise ValueError(f"replay_fraction={config.replay_fraction} must be between 0 and 1, for example 0.25.")
    if config.replay_max_age < 1:
        raise ValueError(f"replay_max_age={config.replay_max_age} must be at least 1 step, for example 4.")
    if config.replay_fraction == 0:
        return
    if not config.share_prompt:
        raise ValueError(
            f"replay_fraction={config.replay_fraction} needs the log-probs of shared sampling, but share_prompt=False "
            f"selects TRL's plain path. Use share_prompt=True, or replay_fraction=0."
        )
    sampling = {name: getattr(config, name) for name in UNTRUNCATED} | (config.generation_kwargs or {})
    for name, valid in UNTRUNCATED.items():
        if sampling[name] not in valid:
            raise ValueError(
                f"replay_fraction={config.replay_fraction} needs completions that were sampled from the whole "
                f"vocabulary, and {name}={sampling[name]} changes that distribution. Use {name}={valid[0]}, or "
                f"replay_fraction=0."
            )


def _require(name: str, received: str, valid: tuple[str, ...]) -> None:
    if received not in valid:
        raise ValueError(f"{name}={received!r} is unknown. Valid: {', '.join(map(repr, valid))}.")


def refuse_interleaved(option: str, interleaved: Sequence[str]) -> None:
    """A stage of a rollout (`rollout/collect.py`) with anything that TRL interleaves with sampling, such as tools."""
    for name in interleaved:
        raise ValueError(f"{option} does not work with {name}. Use one of them.")


def refuse_extension(config: Any, *, samples_shared: bool) -> None:
    """`num_generations_max` without shared sampling, or with groups that straddle processes."""
    option = f"num_generations_max={config.num_generations_max}"
    if not samples_shared:
        raise ValueError(
            f"{option} needs the KV caches that shared sampling keeps, and shared sampling is off in this run "
            f"(because of use_vllm, or for the reason in the log). Use num_generations_max=None."
        )
    rows = config.per_device_train_batch_size * config.steps_per_generation
    if rows % config.num_generations:
        raise ValueError(
            f"{option} needs whole groups in each process, got {rows} completions per rollout "
            f"(per_device_train_batch_size={config.per_device_train_batch_size} x steps_per_generation="
            f"{config.steps_per_generation}), which is not a multiple of num_generations={config.num_generations}. "
            f"Change one of the three."
        )


def refuse_streamed_resampling(*, is_streamed: bool) -> None:
    """`dead_groups="resample"` on a dataset that cannot be indexed."""
    if is_streamed:
        raise ValueError(
            "dead_groups='resample' picks prompts at random, and rows of a streamed data set (IterableDataset) cannot "
            "be picked. Load the data set into memory or from disk, or use dead_groups='keep' or 'skip'."
        )


def refuse_streamed_curriculum(config: Any, *, is_streamed: bool) -> None:
    """`curriculum="pools"` on a dataset that cannot be indexed. Called before a model is loaded."""
    if is_streamed and config.curriculum == "pools":
        raise ValueError(
            "curriculum='pools' chooses problems by their pass rates, and rows of a streamed data set "
            "(IterableDataset) cannot be chosen. Load the data set into memory or from disk, or use curriculum='off'."
        )


def refuse_replay_without_logps(config: Any, *, samples_shared: bool) -> None:
    """`replay_fraction` without the log-probs of shared sampling."""
    if not samples_shared:
        raise ValueError(
            f"replay_fraction={config.replay_fraction} needs the log-probs of shared sampling, which is off in this "
            f"run (because of use_vllm, or for the reason in the log). Use replay_fraction=0."
        )


def replayed_groups(config: Any) -> int:
    """The groups per rollout that `replay_fraction` allows to be replayed.

    Raises:
        ValueError: the fraction of a rollout is less than one group.
    """
    groups = config.generation_batch_size // config.num_generations
    allowed = int(config.replay_fraction * groups + 1e-9)  # 0.29 * 100 is less than 29
    if allowed == 0:
        raise ValueError(
            f"replay_fraction={config.replay_fraction} of {groups} groups per rollout is less than one group. Use at "
            f"least {1 / groups:.2g}, or larger rollouts."
        )
    return allowed


def refuse_moving_temperature(config: Any, *, shares_prompts: bool) -> None:
    """A `temperature_schedule` on TRL's plain scoring."""
    if config.temperature_schedule != "constant" and not shares_prompts:
        raise ValueError(
            f"temperature_schedule={config.temperature_schedule!r} needs shared prompts, and prompts are not shared in "
            f"this run (the log says why). TRL's plain scoring supports only one temperature. Use 'constant'."
        )


def refuse_temperature_change(config: Any, old: float, new: float, *, shares_prompts: bool) -> None:
    """`trainer.temperature` was changed during the run, and the change cannot take effect."""
    if config.temperature_schedule != "constant":
        raise ValueError(
            f"trainer.temperature was changed from {old:g} to {new:g}, but temperature_schedule="
            f"{config.temperature_schedule!r} sets it before each rollout. Use temperature_schedule='constant' to "
            f"change it yourself."
        )
    if not shares_prompts:
        raise ValueError(
            f"trainer.temperature was changed from {old:g} to {new:g}, but prompts are not shared (because of "
            f"share_prompt=False, or for the reason in the log), and TRL's plain scoring supports only one "
            f"temperature. Use share_prompt=True with a model and settings that allow it, or leave the temperature "
            f"unchanged."
        )


def refuse_beta_without_reference(beta: float, *, may_have_reference: bool) -> None:
    """`trainer.beta` was raised in a run that was built without a reference."""
    if beta != 0.0 and not may_have_reference:
        raise ValueError(
            f"trainer.beta was changed from 0 to {beta:g}, but this run was built without a reference. Use "
            f"log_kl=True, which keeps one while beta is 0, or build the trainer with beta above 0."
        )


def refuse_exact_kl(*, shares_prompts: bool, shares_head: bool) -> None:
    """`kl_estimator="exact"` without shared scoring, or with two LM heads."""
    if not shares_prompts:
        raise ValueError(
            "kl_estimator='exact' needs shared prompts, and prompts are not shared in this run (because of "
            "share_prompt=False, or for the reason in the log). Use kl_estimator='k3'."
        )
    if not shares_head:
        raise ValueError(
            "kl_estimator='exact' needs one LM head for policy and reference, but this run trains the head. Train an "
            "adapter that leaves the head frozen (pass peft_config), or use kl_estimator='k3'."
        )


def refuse_reference_sync(config: Any, *, is_sharded: bool, why_unmixable: str | None) -> None:
    """`sync_ref_model` with an adapter that cannot be mixed into the reference."""
    if is_sharded:
        raise ValueError(
            "sync_ref_model cannot mix sharded adapters, and parameters are sharded in this run (FSDP, ZeRO-3). "
            "Use sync_ref_model=False, or accelerate_configs/multi_gpu.yaml."
        )
    if why_unmixable is not None and config.ref_model_mixup_alpha < 1.0:
        raise ValueError(
            f"ref_model_mixup_alpha={config.ref_model_mixup_alpha} mixes the updates that adapters add to linear "
            f"layers, and this adapter cannot be mixed: {why_unmixable}. Use ref_model_mixup_alpha=1.0, which copies "
            f"it."
        )


def refuse_head_adapter(reason: str | None, *, shares_prompts: bool) -> None:
    """LoRA on the LM head that scoring would ignore."""
    if reason is None and not shares_prompts:
        reason = (
            "it needs shared prompts, and prompts are not shared in this run (because of share_prompt=False, or for "
            "the reason in the log). Use share_prompt=True with a model and settings that allow it"
        )
    if reason is not None:
        raise ValueError(
            f"An adapter on the LM head cannot be trained in this run: {reason}, or leave the head out of "
            f"target_modules."
        )


def refuse_stop_strings(stop_strings: list[str], *, samples_shared: bool, tools: bool) -> None:
    """Stop strings with a sampler that does not support them."""
    if stop_strings and (tools or not samples_shared):
        raise ValueError(
            f"stop_strings={stop_strings} need shared sampling without tools. Use share_prompt=True with "
            f"a model and settings that allow it (see the warning above, if any), or leave stop_strings out."
        )


def refuse_dialogue(*, samples_shared: bool, tools: bool) -> None:
    """`rollout_func=Dialogue(...)` without shared sampling, or with something else that runs the turns."""
    if not samples_shared:
        raise ValueError(
            "Dialogue continues from the KV caches that shared sampling keeps, and shared sampling is off in this run "
            "(because of share_prompt=False, use_vllm or use_transformers_continuous_batching, or for the reason in "
            "the log). Turn it on, or use TRL's environment_factory, which does not need it."
        )
    if tools:
        raise ValueError(
            "Dialogue does not work with tools or environment_factory: each of them runs the turns itself. Use one "
            "of them."
        )
