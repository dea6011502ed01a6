"""Add shared scoring and shared sampling to a model, or report why it cannot have them.

`install_shared_scoring` adds a keyword, `scoring_batch`, to the forward of a causal language model. Scoring then runs
inside the wrapped forward, as data-parallel training requires. `shared_sampling` replaces the decoding loop of the
model's `generate`.
"""

import copy
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing

from grpo_ext.engine.autocast import same_autocast_without_cache, without_adapter_casts
from grpo_ext.engine.batch import Scores, ScoringBatch
from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.engine.loss_in_chunks import loss_in_chunks
from grpo_ext.engine.out_of_memory import score_within_memory
from grpo_ext.engine.prefill import why_unforkable
from grpo_ext.engine.score import score
from grpo_ext.engine.score_chunked import score_in_chunks
from grpo_ext.model.unwrap import base_of

# Architectures whose results change if a prompt is split over two forwards.
INEXACT_ARCHITECTURES = ("bamba",)
# Rotary embeddings whose frequencies depend on the sequence length of the forward.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def install_shared_scoring(lm: PreTrainedModel, *, is_compiled: bool = False) -> None:
    """Make `lm(scoring_batch=ScoringBatch(...))` return `Scores`; every other call still runs TRL's fused forward.

    Call it after TRL's `add_fused_lm_head`, on the model inside PEFT's wrapper.

    Args:
        is_compiled: whether `torch.compile` will wrap the model. Scoring is left uncompiled: its shapes change from
            call to call, and each new shape would trigger a recompilation.
    """
    fused_forward, head = lm.forward, TiledHead.of(lm)

    def score_once(self: PreTrainedModel, batch: ScoringBatch) -> Scores:
        if torch.is_grad_enabled() and batch.loss is not None:
            return loss_in_chunks(self, batch, head, _recompute_context(self))
        if torch.is_grad_enabled() and not batch.fits_one_chunk():
            return score_in_chunks(self, batch, head, _recompute_context(self))
        return score(self, batch, head)

    def score_batch(self: PreTrainedModel, scoring_batch: ScoringBatch) -> Scores:
        # Checkpointed layers drop the cache and merely log it: completions would lose their prompt.
        with disable_gradient_checkpointing(self):
            return score_within_memory(functools.partial(score_once, self), scoring_batch)

    if is_compiled:
        score_batch = torch.compiler.disable(score_batch)

    @functools.wraps(type(lm).forward)
    def forward(self: PreTrainedModel, *args: Any, scoring_batch: ScoringBatch | None = None, **kwargs: Any) -> Any:
        return fused_forward(*args, **kwargs) if scoring_batch is None else score_batch(self, scoring_batch)

    lm.forward = types.MethodType(forward, lm)


def _recompute_context(lm: PreTrainedModel) -> Any:
    """A factory of contexts in which the backward sees the model as the current forward does."""
    autocast = same_autocast_without_cache(lm.device.type)

    @contextmanager
    def context() -> Iterator[None]:
        with autocast, disable_gradient_checkpointing(lm), without_adapter_casts(lm):
            yield

    return context


@contextmanager
def shared_sampling(
    lm: PreTrainedModel, sampler: GroupSampler, stop_strings: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """A context in which `lm.generate` uses `sampler` and stops at `stop_strings`, although transformers rejects stop
    strings for custom samplers."""
    generate, is_patched = lm.generate, "generate" in vars(lm)

    def generate_shared(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        config = copy.copy(generation_config)
        config.stop_strings = None
        if stop_strings:
            kwargs["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, stop_strings)])
        return generate(*args, generation_config=config, custom_generate=sampler, **kwargs)

    own, lm.generate = lm.generation_config.stop_strings, generate_shared
    lm.generation_config.stop_strings = None  # `generate` falls back to these if its argument has none
    try:
        yield
    finally:
        lm.generation_config.stop_strings = own
        if is_patched:
            lm.generate = generate
        else:
            del lm.generate


def stop_strings_of(*configs: GenerationConfig) -> list[str]:
    """The stop strings of the first of these settings of `generate` that has any."""
    found: str | list[str] = next((config.stop_strings for config in configs if config.stop_strings), [])
    return [found] if isinstance(found, str) else list(found)


def why_sampling_unsupported(*configs: GenerationConfig) -> str | None:
    """The reason why these settings of `generate` need transformers' own decoding loop, as text for a log; None if they
    do not."""
    for config in configs:
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            return f"the generation mode is {mode.value}"
        if (config.num_return_sequences or 1) > 1:
            return f"num_return_sequences is {config.num_return_sequences}"
        if config.use_cache is False:
            return "use_cache is off"
        if config.cache_implementation not in (None, "dynamic"):
            return f"cache_implementation is {config.cache_implementation!r}"
        if config.prefill_chunk_size is not None:
            return f"prefill_chunk_size is {config.prefill_chunk_size}"
    return None


def why_scoring_unsupported(
    model: PreTrainedModel, args: GRPOConfig, *, is_multimodal: bool, is_sharded: bool
) -> str | None:
    """The reason why a trainer with these settings cannot share prompts exactly, as text for a log; None if it can."""
    lm = base_of(model)
    config = lm.config.get_text_config()
    if is_multimodal:
        return "its inputs are multimodal"
    if args.cast_lm_head_to_fp32:
        return "cast_lm_head_to_fp32 is on"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout is on"
    if getattr(config, "attention_dropout", 0.0):
        return "attention_dropout is on"
    if (name := _functional_dropout(model)) is not None:
        return f"{name} is on"
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha adds noise that depends on the length of a forward"
    if getattr(config, "router_jitter_noise", 0.0):
        return "its routers add noise (router_jitter_noise)"
    return why_sharing_unsupported(model, is_sharded=is_sharded)


def _functional_dropout(model: nn.Module) -> str | None:
    """The name of a dropout that a module applies without an `nn.Dropout`, such as `attention_dropout`; None if every
    one is 0. `disable_dropout` of TRL does not reach them."""
    values = (item for module in model.modules() for item in vars(module).items())
    return next((name for name, value in values if "drop" in name and isinstance(value, float) and value > 0), None)


def why_sharing_unsupported(model: PreTrainedModel, *, is_sharded: bool) -> str | None:
    """The reason why this model, in evaluation mode, cannot compute a prompt apart from its completions with the same
    result, as text for a log; None if it can."""
    lm = base_of(model)
    config = lm.config.get_text_config()
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    adapters = model.peft_config.values() if hasattr(model, "peft_config") else ()
    if config.model_type in INEXACT_ARCHITECTURES:
        return f"{config.model_type} gives different results if a prompt is split over two forwards"
    if is_sharded:
        return "its parameters are sharded, and the processes would run different numbers of forwards"
    if lm.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if rope in LENGTH_DEPENDENT_ROPE:
        return f"its rotary embedding is {rope!r}, which depends on the length of the sequence"
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "its adapter uses prompt learning"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "its adapter is an activated LoRA"
    return _why_cache_unforkable(lm)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 has split the parameters of this model over processes."""
    return is_deepspeed_zero3_enabled() or any(map(is_fsdp_managed_module, model.modules()))


def _why_cache_unforkable(lm: PreTrainedModel) -> str | None:
    """Run the model on two tokens and inspect the cache that it returns."""
    with torch.no_grad(), disable_gradient_checkpointing(lm):
        output = lm.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=lm.device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    return "it has no cache" if cache is None else why_unforkable(cache)
