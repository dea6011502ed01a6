"""The parts that a `GRPOExtTrainer` holds, built from its settings, and the order of its rollout stages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_ext import refusals
from grpo_ext.checkpoints.state import Stateful
from grpo_ext.checks.watch import Watch
from grpo_ext.console.phase_timer import PhaseTimer
from grpo_ext.engine.install import (
    install_shared_scoring,
    stop_strings_of,
    why_sampling_unsupported,
    why_scoring_unsupported,
)
from grpo_ext.engine.scorer import Scorer
from grpo_ext.losses.dead_groups import SkippedRows
from grpo_ext.losses.reference_kl import ReferenceKL
from grpo_ext.model.lm_head_lora import has_head_adapter, why_head_untrainable
from grpo_ext.model.load import disable_4bit_repacking
from grpo_ext.model.unwrap import base_of
from grpo_ext.report.recorder import Recorder
from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.collect import Record, RolloutStage, StageContext
from grpo_ext.rollout.dialogue import Dialogue
from grpo_ext.rollout.dialogue_player import DialoguePlayer
from grpo_ext.rollout.old_logprobs import OldLogprobs
from grpo_ext.rollout.pools import DifficultyPools
from grpo_ext.rollout.sampler import CompletionSampler
from grpo_ext.rollout.stages.extend_groups import ExtendGroups
from grpo_ext.rollout.stages.replay import Replay
from grpo_ext.rollout.stages.resample import Resample
from grpo_ext.rollout.temperature import TemperatureControl
from grpo_ext.rollout.types import Completion

if TYPE_CHECKING:
    from grpo_ext.trainer import GRPOExtTrainer

logger = get_logger(__name__)

STAGES = (ExtendGroups, Resample, Replay)  # the order matters: each stage samples through the ones before it


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a trainer; `dialogue`, `pools` and `watch` are None if the run has no dialogue, curriculum or
    guards."""

    phases: PhaseTimer
    temperature: TemperatureControl
    sampler: CompletionSampler
    dialogue: DialoguePlayer | None
    pools: DifficultyPools | None
    stages: tuple[RolloutStage, ...]
    scorer: Scorer
    old_logprobs: OldLogprobs
    skipped_rows: SkippedRows
    reference_kl: ReferenceKL
    recorder: Recorder
    watch: Watch | None

    @property
    def states(self) -> dict[str, Stateful]:
        """The parts that carry something from step to step, by the name of their state in checkpoints."""
        named: dict[str, Stateful] = {
            "temperature": self.temperature,
            "old_logprobs": self.old_logprobs,
            "skipped_rows": self.skipped_rows,
            "memory_limits": self.scorer.limits,
            **({} if self.pools is None else {"pools": self.pools}),
            **({} if self.watch is None else {"watch": self.watch}),
        }
        return named | {type(stage).__name__: stage for stage in self.stages if isinstance(stage, Stateful)}


@dataclass(frozen=True, kw_only=True)
class TrainerHooks:
    """The methods of the trainer that its parts may call: bound, so that a copy of the trainer calls its own.

    Attributes:
        record: adds a value to a metric.
        total_rewards: total reward of each row from the values of the reward functions, shape (..., F) -> (...).
        score: log-probs of completions under the current policy, and their mask, shapes (B, C).
        dataset: returns the training data.
        step: returns the number of optimizer steps so far.
        train_metrics: returns the training metrics since the last log.
        micro_batches: returns the micro-batches of the current rollout.
    """

    record: Record
    total_rewards: Callable[[Tensor], Tensor]
    score: Callable[[list[Completion]], tuple[Tensor, Tensor]]
    dataset: Callable[[], Any]
    step: Callable[[], int]
    train_metrics: Callable[[], dict[str, list[float]]]
    micro_batches: Callable[[], list[dict[str, Any]]]


def build_parts(
    trainer: "GRPOExtTrainer",
    tokenizer: PreTrainedTokenizerBase,
    hooks: TrainerHooks,
    *,
    has_reference: bool,
    pools: DifficultyPools | None,
) -> Parts:
    """Build the parts of a trainer whose TRL constructor has run.

    Raises:
        ValueError: a setting does not work with this model or with another setting; the message says what to type.
    """
    args, accelerator = trainer.args, trainer.accelerator
    scorer = _prepare_scoring(trainer)
    sampler = _sampler(trainer, scorer, tokenizer)
    context = _stage_context(trainer, sampler, hooks, pools)
    refusals.refuse_moving_temperature(args, shares_prompts=scorer.shares_prompts)
    reference_kl = ReferenceKL(
        has_reference=has_reference, estimator=args.kl_estimator, bias_corrected=args.use_bias_correction_kl
    )
    if reference_kl.is_exact:
        head = base_of(trainer.model).get_output_embeddings()
        shares_head = trainer.ref_model is None and not scorer.requires_sharing and not head.weight.requires_grad
        refusals.refuse_exact_kl(shares_prompts=scorer.shares_prompts, shares_head=shares_head)
    return Parts(
        phases=PhaseTimer(),
        temperature=TemperatureControl(
            schedule=args.temperature_schedule,
            start=args.temperature,
            end=args.temperature_end,
            entropy_target=args.temperature_entropy_target,
            device=accelerator.device,
            reduce=accelerator.reduce,
        ),
        sampler=sampler,
        dialogue=_dialogue_player(trainer, sampler, tokenizer, hooks),
        pools=pools,
        stages=tuple(stage for kind in STAGES if (stage := kind.build(context)) is not None),
        scorer=scorer,
        old_logprobs=OldLogprobs(lambda gap: accelerator.gather(gap).max().item()),
        skipped_rows=SkippedRows(),
        reference_kl=reference_kl,
        recorder=Recorder(args, writes=accelerator.is_main_process),
        watch=Watch(trainer, hooks.train_metrics, hooks.micro_batches) if args.guards else None,
    )


def _stage_context(
    trainer: "GRPOExtTrainer", sampler: CompletionSampler, hooks: TrainerHooks, pools: DifficultyPools | None
) -> StageContext:
    interleaved = {
        "tools": bool(trainer.tools),
        "environment_factory": trainer.environment_factories is not None,
        "rollout_func": trainer.rollout_func is not None,
        "images": trainer.is_multimodal,
    }
    return StageContext(
        args=trainer.args,
        sampler=sampler,
        record=hooks.record,
        total_rewards=hooks.total_rewards,
        score=hooks.score,
        dataset=hooks.dataset,
        step=hooks.step,
        pools=pools,
        interleaved=[name for name, is_used in interleaved.items() if is_used],
        process=trainer.accelerator.process_index,
        processes=trainer.accelerator.num_processes,
    )


def _prepare_scoring(trainer: "GRPOExtTrainer") -> Scorer:
    """Prepare the models for shared scoring; if that is impossible, the log says why."""
    model, args = trainer.model, trainer.args
    disable_4bit_repacking(model)  # before anything runs
    reason = (
        why_scoring_unsupported(model, args, is_multimodal=trainer.is_multimodal, is_sharded=trainer.is_sharded)
        if args.share_prompt
        else None
    )
    shares_prompts = args.share_prompt and reason is None
    if reason is not None:
        logger.warning(f"Prompts are not shared between completions, so TRL's plain path is taken: {reason}.")
    if shares_prompts:
        if args.gradient_checkpointing:
            logger.info("Scoring in chunks replaces gradient checkpointing, with the same result.")
        if args.torch_compile:
            logger.warning(
                "torch_compile=True has no effect on shared prompts, because their shapes change from call to call. "
                "Use share_prompt=False to compile TRL's plain path."
            )
        install_shared_scoring(base_of(model), is_compiled=args.torch_compile)
        if trainer.ref_model is not None:  # wrapped by accelerate, or by an engine of DeepSpeed
            reference = base_of(trainer.accelerator.unwrap_model(trainer.ref_model))
            install_shared_scoring(reference, is_compiled=args.torch_compile)
    config, adapts_head = base_of(model).config.get_text_config(), has_head_adapter(model)
    if adapts_head:
        refusals.refuse_head_adapter(why_head_untrainable(model, args), shares_prompts=shares_prompts)
    return Scorer(
        shares_prompts=shares_prompts,
        requires_sharing=adapts_head,
        experts_per_token=config.num_experts_per_tok if trainer.aux_loss_enabled else None,
        autocast=trainer.accelerator.autocast,
    )


def _sampler(trainer: "GRPOExtTrainer", scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> CompletionSampler:
    """The sampler: on shared prompts if the model and the settings allow it; otherwise the log says why not."""
    stop_strings: list[str] = []
    is_shared = False
    if trainer.samples_by_generate:
        configs = trainer.generation_config, base_of(trainer.model).generation_config
        stop_strings = stop_strings_of(*configs)
        reason = why_sampling_unsupported(*configs)
        is_shared = scorer.shares_prompts and reason is None
        if scorer.shares_prompts and reason is not None:
            logger.warning(f"Prompts are not shared in sampling, so transformers' own loop is used: {reason}.")
        refusals.refuse_stop_strings(stop_strings, samples_shared=is_shared, tools=bool(trainer.tools))
    return CompletionSampler(
        is_shared=is_shared,
        temperature=trainer.temperature,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )


def _dialogue_player(
    trainer: "GRPOExtTrainer", sampler: CompletionSampler, tokenizer: PreTrainedTokenizerBase, hooks: TrainerHooks
) -> DialoguePlayer | None:
    if not isinstance(trainer.rollout_func, Dialogue):
        return None
    refusals.refuse_dialogue(samples_shared=sampler.is_shared, tools=bool(trainer.tools))
    return DialoguePlayer(
        sampler=sampler,
        turns=TurnTokenizer(tokenizer, trainer.eos_token_ids, **trainer.chat_template_kwargs),
        max_tokens=trainer.max_completion_length,
        eos_token_id=tokenizer.eos_token_id,
        record=hooks.record,
        gather=trainer.accelerator.gather,
        device=trainer.accelerator.device,
    )
