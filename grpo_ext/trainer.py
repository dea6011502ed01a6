"""`GRPOExtTrainer`: TRL's `GRPOTrainer`, each hook overridden once, in the order in which a step calls them.

The hooks of a step, and the parts (`parts.py`) that do their work:

    training_step
      _prepare_inputs                     once per rollout; its micro-batches keep siblings together
        _generate_and_score_completions     `pools`, temperature, stages (extend, resample, replay), TRL's own method:
          _generate                           samples with shared prompts: `sampler`
          _get_per_token_logps_...            old and reference log-probs on shared prompts: `old_logprobs`, `scorer`
          _calculate_rewards                  rewards
                                            -> advantages, group counts -> `watch`, `recorder`
      compute_loss -> _compute_loss       sequence-level GRPO, or TRL's loss with the chosen KL
        _get_per_token_logps_...            the policy's log-probs: `scorer`, `skipped_rows`
    log, _save_checkpoint                 time per phase; verified checkpoints: `checkpoints`
"""

import copy
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import GRPOTrainer
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc
from trl.trainer.utils import get_config_model_id, split_tensor_dict

from grpo_ext import refusals
from grpo_ext.checkpoints.files import is_foreign
from grpo_ext.checkpoints.fingerprint import OPTIMIZER_SETTINGS, fingerprint
from grpo_ext.checkpoints.hyperparameters import Hyperparameters
from grpo_ext.checkpoints.resume import Checkpoints
from grpo_ext.checkpoints.state import Stateful
from grpo_ext.checkpoints.stop import Stop, start_loader_worker
from grpo_ext.checks.chunk_size import choose_on
from grpo_ext.checks.preflight import before_training, before_weights, try_rewards
from grpo_ext.checks.trial import without_a_trace
from grpo_ext.config import GRPOExtConfig
from grpo_ext.console.phase_timer import PhaseTimer
from grpo_ext.console.progress import show_one_progress
from grpo_ext.console.terminal import escaping_unencodable, forgiving_stdout
from grpo_ext.engine.batch import Scores, order_by_group, prompt_groups
from grpo_ext.engine.decode import SampledCompletions
from grpo_ext.engine.out_of_memory import loss_within_memory
from grpo_ext.engine.scorer import RequestScores, ScoringPass, ScoringRequest
from grpo_ext.hooks import replaced, results_of
from grpo_ext.jsonable import as_json
from grpo_ext.losses.advantages import combine_rewards, population_advantages
from grpo_ext.losses.dead_groups import why_dead_groups_have_gradient
from grpo_ext.losses.micro_batch import MicroBatch
from grpo_ext.losses.separable import WithoutReads, why_inseparable, without_collectives
from grpo_ext.losses.sequence_grpo import SequenceGRPO, policy_weights
from grpo_ext.machine import peak_memory_mb
from grpo_ext.model.adapters import (
    copy_adapter_values,
    keeping_adapter,
    restore_adapter_in_float32,
    trainable_parameters,
)
from grpo_ext.model.lm_head_lora import hide_head_adapter
from grpo_ext.model.load import computes_in_float32, frozen_dtype
from grpo_ext.model.reference import REFERENCE, ReferenceSetup, ReferenceSync, scores_reference, why_unmixable
from grpo_ext.model.unwrap import base_of
from grpo_ext.parts import TrainerHooks, build_parts
from grpo_ext.report.card import write_card_or_warn
from grpo_ext.report.completions_file import CompletionsFile
from grpo_ext.report.metrics_file import MetricsFile
from grpo_ext.report.publisher import Publisher
from grpo_ext.report.run_settings import SettingsFile
from grpo_ext.rollout.collect import collect, record_group_kinds
from grpo_ext.rollout.dialogue import Dialogue
from grpo_ext.rollout.pools import DifficultyPools, chosen_examples
from grpo_ext.rollout.reward_watch import RewardWatch
from grpo_ext.rollout.reward_workers import close_with, close_workers, in_workers, start_workers
from grpo_ext.rollout.sampler import ending_metrics
from grpo_ext.rollout.stages.replay import add_old_logps, pad_completions
from grpo_ext.rollout.types import Completion, Rollout, RolloutInProgress, SampledRows

logger = get_logger(__name__)

# Inputs of a multimodal model that TRL carries from the rollout to the scoring pass, under its own names.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# Attributes of the trainer that a rollout of TRL changes in place.
CHANGED_IN_PLACE = ("state", "generation_config", "_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")
# Methods of the trainer that compute the loss of a micro-batch.
LOSS_HOOKS = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
# Attributes of the trainer that TRL's adaptive entropy bonus changes.
ENTROPY_BONUS = ("entropy_coef", "_entropy_window_stats", "_last_world_entropy")
# Attributes of the trainer that the loss of a micro-batch changes.
CHANGED_BY_LOSS = ("_metrics", "_pending_extra_logs", "_pending_metrics", *ENTROPY_BONUS)
# Attributes of the trainer that are replaced while a loss is computed.
LOSS_ATTRIBUTES = ("beta", "_get_per_token_logps_and_entropies", *ENTROPY_BONUS)
# TRL's table of completions: plain columns, and groups of columns with one column per reward function or logged name.
LOGGED, LOGGED_BY_NAME = ("prompt", "completion", "advantages"), ("rewards", "extra")


class GRPOExtTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with the same constructor and these differences only:

    - `loss_type="grpo_sequence"`: sequence-level GRPO (`losses/sequence_grpo.py`).
    - `scale_rewards="population"`: its group normalisation (`losses/advantages.py`).
    - `share_prompt=True`: sampling and the log-probs of every loss compute each prompt once for all of its completions
      (`engine/`). If that cannot be exact, TRL's path is taken, and the log says why.
    - LoRA on the LM head is trained, including with tied embeddings (`model/lm_head_lora.py`).
    - `kl_estimator`, `log_kl`, and `sync_ref_model` with adapters (`losses/kl.py`, `model/reference.py`).
    - `num_generations_max`, `dead_groups="resample"`, `replay_fraction` (`rollout/stages/`); `dead_groups="skip"`
      (`losses/dead_groups.py`); `temperature_schedule` (`rollout/temperature.py`).
    - `curriculum="pools"`: pass rates decide which problems a rollout is made of (`rollout/pools.py`).
    - `rollout_func=Dialogue(...)`: dialogues with text environments (`rollout/dialogue.py`).
    - Stop strings in `generation_kwargs` work (TRL raises), and completions that end with one do not count as cut off.
    - In float32, old log-probs come from the sampler as long as it agrees with scoring (`rollout/old_logprobs.py`).
    - Rewards that declare `scores_independently = True`, such as `math_answer_reward`, run in worker processes; others
      do on request (`rollout/reward_workers.py`). An error names the reward that raised it, and a slow call is
      reported (`rollout/reward_watch.py`).
    - `guards`, `dry_run`, `kl_stop`: checks before the first step, and a watch during the run (`checks/`).
    - Checkpoints are verified, and a run resumes exactly (`checkpoints/`).
    - `max_hours`, and `enable_jit_checkpoint` for SIGTERM, end `train` after the current step, with a checkpoint
      (`checkpoints/stop.py`). `stop.reason` tells which of them did. transformers itself saves in the middle of a
      step, and a run cannot resume exactly from there.
    - With shared prompts, the rows of a prompt stay in one micro-batch if it has room. This changes what `bnpo` and
      the entropy bonus average over. Completions are sampled under the autocast of training, and
      `off_policy_mask_threshold` compares with the log-probs of the sampler, as TRL does with vLLM.
    - The trainer writes its own model card, pushes a selection of files to the Hub, and survives a failed push
      (`report/`).
    - The frozen base of an adapter is loaded in bfloat16 if the device supports it, and adapters are kept in float32.
    - `metrics.jsonl`, `completions.jsonl` and `run.json` are in the output folder (`report/`); the progress bar shows
      reward and accuracy.

    Every other loss, option and code path is TRL's own. Metrics that this trainer adds to TRL's: `kl_sequence` (nats
    per completion), `ratio`, `policy_loss`, `advantages/mean`, `advantages/mean_abs`, `frac_dead_groups`,
    `frac_groups/mixed|all_right|all_wrong`, `pools/unseen|unsolved|learning|solved`, `reward_drawn`,
    `growth/groups|alive`, `resampled_groups`, `replay/hit_rate|age|dropped_old|dropped_far`, `dialogue/turns|errors`,
    `sampling/logp_gap`, `temperature`, `time/generate|reward|reference|update` (seconds per optimizer step),
    `peak_memory_mb` (the largest so far).
    A group whose rewards are all equal counts as `all_right` if they are at least half of a perfect reward, else as
    `all_wrong`. A perfect reward is the sum of the reward weights (for rewards of up to 1.0), or the highest total seen
    in the run if that is higher.

    Raises:
        TypeError: `args` is not a `GRPOExtConfig`.
        ValueError: the settings, data, rewards or model cannot be trained as requested; the message says what to type.
    """

    args: GRPOExtConfig
    eos_token_ids: list[int]
    control: TrainerControl
    _buffered_inputs: list[dict[str, Any]] | None
    mask_truncated_completions: bool

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOExtConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOExtConfig(f"{name.split('/')[-1]}-GRPO")
        elif not isinstance(args, GRPOExtConfig):
            raise TypeError(
                f"GRPOExtTrainer needs args of type GRPOExtConfig, got {type(args).__name__}. "
                f"GRPOExtConfig has all of its fields: replace the class name."
            )
        self.stop = Stop(args.max_hours, self._largest)
        changed = args.changed_defaults()
        if isinstance(model, str) and peft_config is not None and "dtype" not in (args.model_init_kwargs or {}):
            dtype = frozen_dtype(args)
            args.model_init_kwargs = {**(args.model_init_kwargs or {}), "dtype": dtype}
            if dtype != torch.float32:
                changed.append(f"frozen base in {dtype} (TRL: torch.float32)")
        if environment_factory is None:
            reward_funcs = in_workers(reward_funcs, args.reward_workers, args.reward_timeout, args.seed)
        given = {
            "model": model,
            "reward_funcs": reward_funcs,
            "args": args,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "reward_processing_classes": reward_processing_classes,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "quantization_config": quantization_config,
            "peft_config": peft_config,
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
        }
        refusals.refuse_streamed_curriculum(args, is_streamed=isinstance(train_dataset, IterableDataset))
        if args.guards:
            given["train_dataset"] = before_weights(given)
        pools = DifficultyPools.build(args, given["train_dataset"])
        adapter_values = copy_adapter_values(model)
        adapters = [*getattr(model, "peft_config", {}).values(), *([peft_config] if peft_config else [])]
        reference = ReferenceSetup.of(args, adapters)

        # TRL's constructor calls hooks that read these attributes.
        self._publisher = Publisher(args)
        self._rollout: RolloutInProgress | None = None
        self._unrecorded: RolloutInProgress | None = None
        self._micro_batch: MicroBatch | None = None
        self._train_sampler: Sampler | None = None
        self._timed_from_step: int | None = None
        self._resumed_losses = Losses()
        self._last_save: tuple[int, int] | None = None  # the step, and the number of logs until then
        self.last_checkpoint: Path | None = None
        self._highest_reward = 0.0  # the highest total reward of a completion so far
        with (
            reference.shown_to_trl(args),
            replaced(args, enable_jit_checkpoint=False),  # transformers would install its own handler
            hide_head_adapter(model) if adapters else nullcontext(),
        ):
            super().__init__(**given)
        self.beta = args.beta
        if changed:
            logger.warning(
                f"These defaults differ from TRL's: {', '.join(changed)}. GRPOExtConfig(..., **TRL_DEFAULTS) keeps "
                f"TRL's objective."
            )
        if self.samples_by_generate:
            ends = self.generation_config.eos_token_id
            self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *_as_list(ends)]))
        hooks = TrainerHooks(
            record=self._record_metric,
            total_rewards=self._total_rewards,
            score=self._score_completions,
            dataset=self._current_dataset,
            step=self._current_step,
            train_metrics=self._train_metrics,
            micro_batches=self._micro_batches,
        )
        self.parts = build_parts(self, self._tokenizer, hooks, has_reference=reference.is_needed, pools=pools)
        self._may_have_reference = reference.is_needed or (bool(adapters) and args.kl_estimator != "exact")
        # TRL counts a completion that ends with a stop string as cut off, in its metrics and in its mask. `_generate`
        # corrects the metrics, and `_add_tensors` applies the mask.
        self._masks_cut = bool(self.parts.sampler.stop_strings) and self.mask_truncated_completions
        self.mask_truncated_completions = self.mask_truncated_completions and not self._masks_cut
        if reference.adapter_follows:
            refusals.refuse_reference_sync(args, is_sharded=self.is_sharded, why_unmixable=why_unmixable(self.model))
            self.add_callback(ReferenceSync(self.model))
        if args.asks_to_skip and (reason := self._why_dead_groups_are_kept()) is not None:
            logger.warning(f"dead_groups='skip' keeps dead groups in this run: {reason}.")
        in_chunks = args.chunk_tokens is not None or args.gradient_checkpointing
        if in_chunks and self.shares_prompts and (reason := self._why_loss_inseparable()) is not None:
            logger.warning(f"If an update runs in chunks, each of them runs its forward twice: {reason}.")
        follower = self.ref_model if args.sync_ref_model else None
        facts = [fingerprint(self) if self.accelerator.is_main_process else None]
        self._checkpoints = Checkpoints(
            args=args,
            fingerprint=broadcast_object_list(facts)[0],  # other processes may hold only a part of the model
            states=self.parts.states | {"trainer": TrainerProgress(self)},
            process=self.accelerator.process_index,
            wait=self.accelerator.wait_for_everyone,
            device=self.accelerator.device,
            reference=None if follower is None else self.accelerator.unwrap_model(follower),
        )
        if not (args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3):  # cannot mix dtypes (TRL #6089)
            restore_adapter_in_float32(self.model, adapter_values)
        if args.scale_rewards == "population":
            self.scale_rewards = "none"  # a value that TRL's rollout accepts; `_normalise` replaces its result
        self._is_checked = self._has_tried_rewards = not args.guards
        self._reward_watch = RewardWatch(args.reward_timeout)
        close_with(self, self.reward_funcs)
        self.add_callback(CompletionsFile())
        self.add_callback(SettingsFile(lambda: self._checkpoints.accepted))
        if self.parts.watch is not None:
            self.add_callback(self.parts.watch)
        self.add_callback(MetricsFile())
        show_one_progress(self, callbacks)

    # Read by the parts and by the code that runs a trainer

    @property
    def shares_prompts(self) -> bool:
        """Whether log-probs are computed on shared prompts."""
        return self.parts.scorer.shares_prompts

    @property
    def is_multimodal(self) -> bool:
        """Whether prompts may contain images."""
        return self._is_vlm

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of every parameter."""
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and self.args.deepspeed_plugin.zero_stage == 3)

    @property
    def samples_by_generate(self) -> bool:
        """Whether completions come from transformers' `generate`."""
        own_rollout = self.rollout_func is not None and not isinstance(self.rollout_func, Dialogue)
        return not (self.use_vllm or self.use_transformers_continuous_batching or own_rollout)

    @property
    def card_tags(self) -> list[str]:
        """TRL's tags for a model card."""
        return self._tag_names

    def preflight(self) -> None:
        """Check the run, try its rewards and run its worst-case step. Repeated calls do nothing.

        `train` does the same if this was not called; it tries the rewards after the callbacks' `on_train_begin`.

        Raises:
            ValueError, RuntimeError: see `try_rewards` and `before_training` in `checks/preflight.py`.
        """
        if self._is_checked:
            return
        start_workers(self.reward_funcs)
        try:
            before_training(self, self._try_rewards(replace(self.state, max_steps=self._planned_steps())))
        except BaseException:
            close_workers(self.reward_funcs)
            raise
        self._is_checked = True

    def _try_rewards(self, state: TrainerState) -> dict[str, list[float | None]]:
        if self._has_tried_rewards:
            return {}
        self._has_tried_rewards = True
        return try_rewards(self, state)

    def _planned_steps(self) -> int:
        """The value that `state.max_steps` will have once the run starts; 0 if its data has no length."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if not hasattr(self.train_dataset, "__len__"):
            return 0
        with self.leaving_no_trace():
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return steps

    def find_checkpoint(self, wanted: Any) -> Path | None:
        """The checkpoint that `train(resume_from_checkpoint=wanted)` resumes from; None if it starts at step 0.

        Raises:
            ValueError: the requested checkpoint is unfinished or damaged, or belongs to another run.
        """
        return self._checkpoints.find(wanted, self.train_dataset)

    @escaping_unencodable()
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.stop.forget()
        try:
            with self.stop.on_signals(signal.SIGTERM) if self.args.enable_jit_checkpoint else nullcontext():
                output = self._train_with_workers(resume_from_checkpoint, *args, **kwargs)
                if self.stop.defers:  # steps were run, and a signal may have come after the last one
                    self.stop.is_due()
        finally:
            self.stop.defers = False
            close_workers(self.reward_funcs)
        if self.stop.reason is not None and not self.stop.is_listening:  # else the caller reports it
            logger.warning(
                f"Training was stopped by {self.stop.reason} after step {self.state.global_step} of "
                f"{self.state.max_steps}; {self.last_checkpoint} is complete. To continue, call "
                f"train(resume_from_checkpoint='last')."
            )
        return output

    def _train_with_workers(self, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.dry_run:
            self.preflight()
            return TrainOutput(0, 0.0, {})
        start_workers(self.reward_funcs)
        if not self._is_checked:
            before_training(self, {})
            self._is_checked = True
        folder = self.find_checkpoint(resume_from_checkpoint)
        self._checkpoints.refuse_foreign(folder)
        self._resumed_losses = Losses()
        self.last_checkpoint = folder
        evaluates_first = self.args.eval_on_start
        self.args.eval_on_start = evaluates_first and folder is None  # a resumed run did so at its start
        try:
            return super().train(folder and str(folder), *args, **kwargs)
        finally:
            self.args.eval_on_start = evaluates_first

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's loaders wrap one of torch
        inner.worker_init_fn = partial(start_loader_worker, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        is_saved = Path(resume_from_checkpoint, REFERENCE).is_dir()
        if is_saved and REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(REFERENCE)  # the saved one may have another rank
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        built = Hyperparameters.of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or is_foreign(Path(checkpoint)):
            return
        accepted = self._checkpoints.just_accepted
        if accepted & OPTIMIZER_SETTINGS:
            built.put_into(self.optimizer, self.lr_scheduler)
        if self._train_sampler is not None:
            for _ in range(int(self.state.epoch)):  # each pass over the data samples its order at its start
                next(iter(self._train_sampler))
        self._checkpoints.load(Path(checkpoint))
        if self._checkpoints.changes_processes:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if self.parts.temperature.temperature != self.temperature:
            self._set_temperature(self.parts.temperature.temperature)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._checkpoints.changes_processes:
            # Not the random numbers of the first steps.
            set_seed(self.args.seed + self.state.global_step, device_specific=True)
        else:
            super()._load_rng_state(checkpoint)

    def _run_epoch(self, **kwargs: Any) -> None:
        losses, self._resumed_losses = self._resumed_losses, Losses()  # transformers starts at 0 in each session
        self._total_loss_scalar += losses.logged
        self._tr_loss += losses.unlogged
        if losses.last_logged_step is not None:
            self._globalstep_last_logged = losses.last_logged_step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._try_rewards(self.state)
        self.stop.defers = True
        super()._run_epoch(**kwargs)
        self._end_if_stopped(kwargs["model"], kwargs["trial"])

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.stop.reason is not None:  # transformers also calls this at the end of an epoch that was cut short
            return
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self.state.epoch % 1:  # else the epoch is not over before its own logs, evaluation and save
            self._end_if_stopped(model, trial)

    def _end_if_stopped(self, model: nn.Module, trial: Any) -> None:
        """End the run here, with a checkpoint, if a signal or `max_hours` asks for it."""
        if not self.stop.is_due():
            return
        self.control.should_training_stop = True
        if self._last_save != (self.state.global_step, len(self.state.log_history)):
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        kept = {} if self.stop.reason is None else {"save_total_limit": None, "load_best_model_at_end": False}
        # transformers would delete the last checkpoint if it is not the best, and load the best adapter
        with replaced(self.args, **kept):
            output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])  # over all sessions, see `log`

    def _largest(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    # A step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._timed_from_step is None:
            self._timed_from_step = self.state.global_step
        with self.parts.phases("update"):
            loss = super().training_step(*args, **kwargs)
        if self.parts.watch is not None:
            self.parts.watch.after_loss(loss)
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As TRL's, except that the rows of a prompt stay together: TRL shuffles the rows of a rollout before it splits
        them into micro-batches."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs
        if self._unrecorded is not None:
            rollout, self._unrecorded = self._unrecorded, None
            is_cut = self._is_cut(rollout.completion_ids, rollout.is_cut)
            self.parts.recorder(rollout, is_cut, step=self.state.global_step + 1, logs=self._logs)
        if parts is None or parts is before or not self.shares_prompts:
            return inputs
        whole = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        order = order_by_group(prompt_groups(whole["prompt_ids"], whole["prompt_mask"]))
        devices = {value.device for value in whole.values() if isinstance(value, Tensor)}
        orders = {device: torch.tensor(order, device=device) for device in devices}
        whole = {name: _in_order(value, order, orders) for name, value in whole.items()}
        self._buffered_inputs = split_tensor_dict(whole, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outer, is_training = self._rollout, self.model.training
        if is_training:
            inputs = self._chosen_examples(inputs)
        self._rollout = current = RolloutInProgress(examples=inputs, is_training=is_training)
        try:
            with self.parts.phases("reference"):  # sampling and rewards, timed inside, are not counted here
                refusals.refuse_beta_without_reference(self.beta, may_have_reference=self._may_have_reference)
                if is_training:
                    self._move_temperature()
                if is_training and self.parts.stages:
                    current.rollout = collect(inputs, self._draw, self.parts.stages)
                    self._record_metric("reward_drawn", torch.cat(current.rollout.sampled_PM).nanmean().item())
                    inputs = [completion.example for completion in current.rollout.completions]
                beta = self.beta or float(self.parts.reference_kl.has_reference)  # TRL's condition for the reference
                with self._hooks_heard(current), replaced(self, beta=beta):
                    output = super()._generate_and_score_completions(inputs)
            self._add_tensors(output, current)
            self._normalise(output, current)
        finally:
            self._rollout = outer
        if is_training:
            if self.parts.watch is not None:
                self.parts.watch.after_rollout(self._metrics["train"], self._share_cut(current))
            self._unrecorded = current
        return output

    def _chosen_examples(self, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a rollout: those of the data loader, unless the pools choose other problems."""
        if self.parts.pools is None:
            return loaded
        G, accelerator = self.num_generations, self.accelerator
        chosen = self.parts.pools.choose(len(loaded) * accelerator.num_processes // G)
        return chosen_examples(loaded, chosen, self.train_dataset, group_size=G, process=accelerator.process_index)

    @contextmanager
    def _hooks_heard(self, current: RolloutInProgress) -> Iterator[None]:
        """A context in which TRL's rollout uses the rollout that the stages collected, if there is one, and in which
        `current` records what the outermost overrides of `_generate` and `_calculate_rewards` return."""
        generate, calculate_rewards = self._generate, self._calculate_rewards

        def generate_or_serve(prompts: list[Any]) -> tuple[Any, ...]:
            if current.rollout is None:
                generated = generate(prompts)
                current.rows = self._rows_of(generated, current)
            else:
                generated = current.rollout.as_generated()
                current.rows = current.rollout.sampled_rows()
            current.is_cut = current.rows.is_cut
            return generated

        def calculate_or_serve(examples: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
            if current.rollout is None:
                current.rewards_BF = calculate_rewards(examples, prompts, completions, completion_ids)
            else:
                current.rewards_BF = current.rollout.rewards_BF
                completions_of_rollout = current.rollout.completions
                for column in dict.fromkeys(column for row in completions_of_rollout for column in row.extra):
                    values = [row.extra.get(column) for row in completions_of_rollout]  # a reward may log it rarely
                    self._pending_extra_logs[column].extend(values)
            current.scored(examples, completion_ids, list(self._pending_extra_logs))
            return current.rewards_BF

        with replaced(self, _generate=generate_or_serve, _calculate_rewards=calculate_or_serve):
            yield

    def _draw(self, examples: list[dict[str, Any]]) -> Rollout:
        """Sample completions for these rows of this process, with the rewards of all processes. If the rows are not
        whole groups, each row counts as a group of its own."""
        assert self._rollout is not None
        prompts = [example["prompt"] for example in examples]
        generated = self._generate(prompts)
        rows = self._rows_of(generated, self._rollout)
        _, completion_ids, _, completions, *_ = generated
        rewards_BF = self._calculate_rewards(examples, prompts, completions, completion_ids)
        extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        is_whole = len(rewards_BF) % self.num_generations == 0
        return Rollout.of(
            examples,
            generated,
            rows,
            extra,
            rewards_BF=rewards_BF,
            all_rewards_PM=self._total_rewards(rewards_BF).view(-1, self.num_generations if is_whole else 1),
            first_row=self.accelerator.process_index * len(examples),
        )

    def _generate(self, prompts: list[Any]) -> Any:
        if self._rollout is not None:
            self._rollout.is_cut = None
        with self.parts.phases("generate"):
            generated = super()._generate(prompts)
        if self.parts.sampler.stop_strings and self._rollout is not None:
            is_cut = self._is_cut(generated[1], self._rollout.is_cut)
            metrics = self._metrics["train" if self._rollout.is_training else "eval"]
            _, completion_ids, own_tokens_mask, *_ = generated
            lengths = [sum(row) for row in own_tokens_mask or [[1] * len(ids) for ids in completion_ids]]
            for name, value in ending_metrics(lengths, is_cut, self.accelerator).items():
                metrics[f"completions/{name}"][-1] = value
        return generated

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        generate = super()._generate_single_turn
        if not self.parts.sampler.is_shared:
            with keeping_adapter(self.model):  # TRL casts the whole model for continuous batching
                return generate(*args, **kwargs)
        lm = base_of(self.accelerator.unwrap_model(self.model))
        with self.accelerator.autocast():  # as in scoring, so that both see the same model; TRL samples without it
            completion_ids, logps, is_cut = self.parts.sampler.sample(lm, lambda: generate(*args, **kwargs))
        if self._rollout is not None:
            self._rollout.is_cut = is_cut
        return completion_ids, logps

    def play(self, dialogue: Dialogue) -> dict[str, list[Any]]:
        """The dialogues of this rollout in the form that TRL expects of a `rollout_func`, with the column that
        `dialogue_reward` reads."""
        assert self._rollout is not None
        assert self.parts.dialogue is not None
        output, self._rollout.is_cut = self.parts.dialogue(dialogue, self._rollout.examples, self._generate_turns)
        return output

    def _generate_turns(self, histories: list[list[int]]) -> SampledCompletions:
        assert self._rollout is not None
        tokens, logps = self._generate_single_turn(histories, None, {}, self.num_generations)
        if logps is None:
            raise RuntimeError(
                "Dialogue needs the log-probs of shared sampling, but an override of _generate_single_turn or "
                "model.generate sampled instead. Return log-probs, or remove the override."
            )
        return SampledCompletions(tokens=tokens, logps=logps, is_cut=self._is_cut(tokens, self._rollout.is_cut))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        watched = self._reward_watch.watched(self.reward_funcs, self.reward_func_names)
        with self.parts.phases("reward"), replaced(self, reward_funcs=watched):
            rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._rollout is None and self.model.training:  # called from a subclass's own rollout
            self._unrecorded = RolloutInProgress(examples=inputs, is_training=True)
            self._unrecorded.scored(inputs, completion_ids_list, list(self._pending_extra_logs))
        return rewards_BF

    def _rows_of(self, generated: tuple[Any, ...], current: RolloutInProgress) -> SampledRows:
        """Describe the rows that `_generate` returned."""
        _, completion_ids, own_tokens_mask, _, logps, *_ = generated
        is_cut = current.is_cut
        if self.tools or is_cut is None or len(is_cut) != len(completion_ids):
            is_cut = None  # tools and overrides may sample several times, with different rows each time
        return SampledRows(
            completion_ids=completion_ids,
            temperatures=[self.parts.temperature.temperature] * len(completion_ids),
            # The tokens between turns were not sampled: TRL's pass computes the old log-probs of such rows.
            logps=logps if own_tokens_mask is None else None,
            is_cut=is_cut,
            is_replayed=[False] * len(completion_ids),
        )

    def _is_cut(self, completion_ids: list[list[int]], is_cut: list[bool] | None) -> list[bool]:
        """Whether each row was cut off. If the sampler did not report it, the last token decides, as in TRL."""
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return [ids[-1] not in ends for ids in completion_ids] if is_cut is None else is_cut

    def _share_cut(self, current: RolloutInProgress) -> float:
        """The share of completions of all processes that were cut off."""
        is_cut = self._is_cut(current.completion_ids, current.is_cut)
        is_cut_B = self.accelerator.gather(torch.tensor(is_cut, device=self.accelerator.device))
        return is_cut_B.float().mean().item()

    def _add_tensors(self, output: dict[str, Any], current: RolloutInProgress) -> None:
        """Add the tensors that this trainer's update needs to those of TRL."""
        device = self.accelerator.device
        if self._masks_cut:
            is_cut = self._is_cut(current.completion_ids, current.is_cut)
            output["completion_mask"] = output["completion_mask"] * ~torch.tensor(is_cut, device=device).unsqueeze(1)
            own_mask = output["completion_mask"] * output.get("tool_mask", 1)
            output["num_items_in_batch"] = self.accelerator.gather(own_mask.sum()).sum()
        if current.ref_hidden_BCH is not None:
            output["ref_hidden_states"] = current.ref_hidden_BCH
        if current.is_training and self.args.replay_fraction > 0:
            assert current.rows is not None
            output["temperature"] = torch.tensor(current.rows.temperatures, dtype=torch.float64)
            output["is_replayed"] = torch.tensor(current.rows.is_replayed, device=device)

    def _normalise(self, output: dict[str, Any], current: RolloutInProgress) -> None:
        """Count the kinds of groups, and replace TRL's advantages if `scale_rewards` is "population"."""
        assert current.rewards_BF is not None
        rewards_B, rollout = self._total_rewards(current.rewards_BF), current.rollout
        G = self.num_generations if current.is_training else self.num_generations_eval
        sampled_PM = [rewards_B.view(-1, G)] if rollout is None else rollout.sampled_PM
        highest = max(group_PM.nan_to_num(nan=-torch.inf).max().item() for group_PM in sampled_PM)
        self._highest_reward = max(self._highest_reward, highest)
        attainable = max(self.reward_weights.clamp(min=0).sum().item(), self._highest_reward)
        record_group_kinds(self._record_metric, sampled_PM, attainable)
        if current.is_training and self.parts.pools is not None:
            self.parts.pools.observe(sampled_PM, perfect=attainable)
            for pool, share in self.parts.pools.shares().items():
                self._record_metric(f"pools/{pool}", share)
        if not (self.args.scale_rewards == "population" and self.scale_rewards == "none"):
            return
        all_rewards_PM = None if rollout is None else rollout.all_rewards_PM
        advantages_B = population_advantages(rewards_B, G, all_rewards_PM=all_rewards_PM)
        own = self.accelerator.process_index * len(output["advantages"])
        output["advantages"] = advantages_B[own : own + len(output["advantages"])].to(output["advantages"].device)
        self._log_advantages(advantages_B)

    def _log_advantages(self, advantages_B: Tensor) -> None:
        """Replace the advantages that TRL has logged, with those of all processes."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages_B))):
            logged.pop()
        logged.extend(advantages_B.tolist())
        self._record_metric("advantages/mean", advantages_B.mean().item())
        self._record_metric("advantages/mean_abs", advantages_B.abs().mean().item())

    def _move_temperature(self) -> None:
        """Set the temperature of the next rollout: the schedule's, or a value that a callback has set."""
        control, wanted = self.parts.temperature, self.temperature
        if wanted != control.temperature:
            refusals.refuse_temperature_change(
                self.args, control.temperature, wanted, shares_prompts=self.shares_prompts
            )
            control.temperature = wanted
        elif control.moves:
            wanted = control.next(self.state.global_step, self.state.max_steps)
            self._record_metric("temperature", wanted)
        else:
            return
        self._set_temperature(wanted)

    def _set_temperature(self, temperature: float) -> None:
        """Set the temperature of this trainer, and of the sampler of grpo-ext, transformers or vLLM."""
        self.temperature = temperature
        self.parts.sampler.set_temperature(temperature)
        if self.use_vllm:
            self.vllm_generation.temperature = temperature
        else:
            self.generation_config.temperature = temperature
            self.generation_kwargs["temperature"] = temperature

    # Scoring

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        parent, scoring_pass = super()._get_per_token_logps_and_entropies, self._scoring_pass(model)
        completion_ids, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
        # `micro_batch` and `sampled` describe particular rows, and an override may score other ones.
        micro_batch = self._micro_batch if scoring_pass is ScoringPass.UPDATE else None
        if micro_batch is not None and micro_batch.scores is not None:
            return micro_batch.scores.logps_BC, micro_batch.scores.entropies_BC, None
        if micro_batch is not None and not micro_batch.has_rows(completion_ids):
            micro_batch = None
        sampled = self._rollout.rows if self._rollout is not None else None
        if sampled is not None and not sampled.are_rows_of(completion_ids, mask):
            sampled = None
        request = ScoringRequest(
            scoring_pass=scoring_pass,
            input_ids_BT=input_ids,
            attention_mask_BT=attention_mask,
            completion_tokens=logits_to_keep,
            temperatures=self._temperatures(len(input_ids), sampled, micro_batch),
            max_rows=batch_size,
            chunk_tokens=None if isinstance(self.args.chunk_tokens, str) else self.args.chunk_tokens,
            one_row_at_a_time=self.args.gradient_checkpointing and not self.parts.scorer.limits.is_chosen,
            with_entropies=compute_entropy,
            with_aux_loss=compute_aux_loss,
            with_hidden=scoring_pass is ScoringPass.REFERENCE and self.parts.reference_kl.is_exact,
            **({} if micro_batch is None else micro_batch.scoring_options()),
        )

        def score(rows: slice = slice(None)) -> RequestScores:
            ids, mask = input_ids[rows], attention_mask[rows]
            options = logits_to_keep, batch_size, compute_entropy, compute_aux_loss
            return self.parts.scorer(model, request[rows], lambda: parent(model, ids, mask, *options, **multimodal))

        if scoring_pass is ScoringPass.OLD and sampled is not None and not compute_entropy:
            scores = self._score_old(sampled, mask, score)
        else:
            scores = score()
        if scoring_pass is ScoringPass.REFERENCE and self._rollout is not None:
            self._rollout.ref_hidden_BCH = scores.hidden_BCH
        if micro_batch is not None:
            scores = self._after_update_pass(micro_batch, scores)
        return scores.logps_BC, scores.entropies_BC, scores.aux_loss

    def _scoring_pass(self, model: nn.Module) -> ScoringPass:
        if scores_reference(model, self.ref_model):
            return ScoringPass.REFERENCE
        is_update = self._micro_batch is not None or torch.is_grad_enabled()
        return ScoringPass.UPDATE if is_update else ScoringPass.OLD

    def _temperatures(self, rows: int, sampled: SampledRows | None, micro_batch: MicroBatch | None) -> list[float]:
        """The temperature that each row was sampled at."""
        if micro_batch is not None and "temperature" in micro_batch.inputs:
            return micro_batch.inputs["temperature"].tolist()
        return [self.parts.temperature.temperature] * rows if sampled is None else sampled.temperatures

    def _score_old(self, sampled: SampledRows, mask_BC: Tensor, score: Callable[..., RequestScores]) -> RequestScores:
        if sampled.logps is None or not self.parts.sampler.is_shared:
            return score()
        is_float32 = self.accelerator.mixed_precision == "no" and computes_in_float32(self.model)
        tolerance = self.epsilon_low / 10 if is_float32 else 0.0
        scores, gap = self.parts.old_logprobs(sampled, mask_BC, score, step=self.state.global_step, tolerance=tolerance)
        self._record_metric("sampling/logp_gap", gap)
        return scores

    def _after_update_pass(self, micro_batch: MicroBatch, scores: RequestScores) -> RequestScores:
        """Pass the scores of an update to the parts, and fill in the rows that were skipped."""
        micro_batch.exact_kls_BC, micro_batch.loss_gradient = scores.kls_BC, scores.loss_gradient
        if torch.is_grad_enabled() and scores.entropies_BC is not None:
            if micro_batch.skip_idle:
                logps_BC, entropies_BC = self.parts.skipped_rows.fill(
                    scores.logps_BC,
                    scores.entropies_BC,
                    scores.skipped_rows,
                    old_logps_BC=micro_batch.inputs.get("old_per_token_logps"),
                )
                scores = replace(scores, logps_BC=logps_BC, entropies_BC=entropies_BC)
            assert scores.entropies_BC is not None
            self.parts.temperature.observe(scores.entropies_BC, micro_batch.mask_BC)
        add_old_logps(micro_batch.inputs, scores.logps_BC)
        return scores

    def _score_completions(self, completions: list[Completion]) -> tuple[Tensor, Tensor]:
        """Log-probs of these completions under the current policy, and their mask, shapes (B, C)."""
        assert self._rollout is not None
        ids_BT, mask_BT, C = pad_completions(completions, self._tokenizer.pad_token_id, self.accelerator.device)
        self._rollout.rows = SampledRows(
            completion_ids=[row.completion_ids for row in completions],
            temperatures=[row.temperature for row in completions],
            logps=None,  # this pass computes them
            is_cut=None,
            is_replayed=[True] * len(completions),
        )
        rows = self.args.per_device_train_batch_size
        try:
            logps_BC, _, _ = self._get_per_token_logps_and_entropies(self.model, ids_BT, mask_BT, C, batch_size=rows)
        finally:
            self._rollout.rows = None
        return logps_BC, mask_BT[:, -C:]

    # Update

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._must_choose_chunk_size():
            with without_a_trace(self):
                chosen = choose_on(self, inputs)
            self.parts.scorer.limits.choose(chosen.tokens)
            logger.info(f"Updates run {chosen.reason}.")
        with self._updating(inputs) as micro_batch:
            loss_of = partial(super().compute_loss, model, micro_batch.inputs, *args, **kwargs)
            # Processes wait for each other in a loss, so one of several cannot repeat it alone.
            is_alone = self.accelerator.num_processes == 1
            if not (is_alone and self.shares_prompts and torch.is_grad_enabled() and self._why_loss_inseparable()):
                return loss_of()
            parameters = list(trainable_parameters(self.model).values())
            limits, scale = self.parts.scorer.limits, self._loss_scale()
            return loss_within_memory(loss_of, parameters, limits, self._snapshot_of_loss, scale)

    def _snapshot_of_loss(self) -> Callable[[], None]:
        """A function that undoes what the loss of a micro-batch has changed in this trainer and its parts."""
        attributes = {name: copy.deepcopy(getattr(self, name)) for name in CHANGED_BY_LOSS}
        # The parts that receive the scores of an update.
        parts: tuple[Stateful, ...] = (self.parts.temperature, self.parts.skipped_rows)
        states = [copy.deepcopy(part.state_dict()) for part in parts]

        def undo() -> None:
            self.__dict__.update(attributes)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)

        return undo

    def _must_choose_chunk_size(self) -> bool:
        is_open = self.args.chunk_tokens == "auto" and not self.parts.scorer.limits.is_chosen
        return is_open and self.shares_prompts and torch.is_grad_enabled()

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss_of = self._sequence_loss if self.loss_type == "grpo_sequence" else self._trl_loss
        with self._updating(inputs) as micro_batch:
            if torch.is_grad_enabled() and self._why_loss_inseparable() is None:
                micro_batch.loss = self._loss_of_scores(loss_of, model, micro_batch)
            loss = loss_of(model, micro_batch)
            if micro_batch.loss_gradient is None:
                return loss
            return loss + micro_batch.loss_gradient / self._loss_scale()

    def _why_loss_inseparable(self) -> str | None:
        """The reason why chunks cannot be run forward and backward at once; None if they can."""
        if (name := self._overridden(*LOSS_HOOKS)) is not None:
            return f"{name} is overridden"
        if self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16":
            return "DeepSpeed scales a loss for fp16 after it was computed"
        return why_inseparable(
            loss_type=self.loss_type,
            has_aux_loss=self.aux_loss_enabled,
            aux_loss_coef=self.router_aux_loss_coef,
            top_entropy_quantile=self.top_entropy_quantile,
        )

    def _overridden(self, *names: str) -> str | None:
        """The first of these methods that a subclass or an attribute of this object replaces; None if there is none."""
        methods = ((name, getattr(getattr(self, name), "__func__", None)) for name in names)
        return next((name for name, method in methods if method is not getattr(GRPOExtTrainer, name)), None)

    def _loss_scale(self) -> float | Tensor:
        """The factor that keeps small gradients from becoming 0 in fp16. It stays on the device: reading it would make
        the host wait."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))

    def _loss_of_scores(
        self, loss_of: Callable[[nn.Module, MicroBatch], Tensor], model: nn.Module, micro_batch: MicroBatch
    ) -> Callable[[Scores], Tensor]:
        """A function from scores to the loss that this micro-batch has with them, at the scale of fp16. It records
        nothing, and may be called while `loss_of` runs."""
        attributes, scale = {name: getattr(self, name) for name in LOSS_ATTRIBUTES}, self._loss_scale()

        def loss(scores: Scores) -> Tensor:
            inputs = dict(micro_batch.inputs)
            add_old_logps(inputs, scores.logps_BC)
            given = MicroBatch(inputs=inputs, scores=scores, exact_kls_BC=scores.kls_BC)
            metrics: Any = defaultdict(lambda: defaultdict(list))
            silently = replaced(self, **attributes, _micro_batch=given, _metrics=metrics)
            with silently, without_collectives(self.accelerator), WithoutReads():
                return scale * loss_of(model, given)

        return loss

    @contextmanager
    def _updating(self, inputs: dict[str, Any]) -> Iterator[MicroBatch]:
        """A context in which scoring is part of the update on this micro-batch."""
        outer = self._micro_batch
        if outer is not None and outer.inputs is inputs:
            yield outer
            return
        # TRL decides in its constructor whether there is an entropy bonus; a callback may have changed that since.
        self._entropy_bonus_enabled = self.entropy_coef != 0.0 or self.use_adaptive_entropy
        has_no_gradient = self.model.training and self._why_dead_groups_are_kept() is None
        micro_batch = MicroBatch(
            inputs=dict(inputs) if "is_replayed" in inputs else inputs,  # old log-probs are added to replayed rows
            separates_idle=has_no_gradient,
            skip_idle=has_no_gradient and self.args.dead_groups == "skip",
        )
        self._micro_batch = micro_batch
        try:
            yield micro_batch
        finally:
            self._micro_batch = outer

    def _why_dead_groups_are_kept(self) -> str | None:
        if not self.shares_prompts:
            return "prompts are not shared"
        if (name := self._overridden("compute_loss", "_compute_loss")) is not None:
            return f"{name} is overridden, and may give their answers a gradient"
        return why_dead_groups_have_gradient(
            beta=self.beta,
            log_kl=self.args.log_kl,
            entropy_coef=self.entropy_coef,
            has_entropy_bonus=self._entropy_bonus_enabled,
            aux_loss_coef=self.router_aux_loss_coef,
            has_aux_loss=self.aux_loss_enabled,
            top_entropy_quantile=self.top_entropy_quantile,
            temperature_schedule=self.args.temperature_schedule,
        )

    def _sequence_loss(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """The loss of sequence-level GRPO, divided by the number of micro-batches per optimizer step."""
        inputs, mask_BC, kl = micro_batch.inputs, micro_batch.mask_BC, self.parts.reference_kl
        logps_BC, entropies_BC, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in MULTIMODAL_INPUTS},
        )
        assert entropies_BC is not None
        objective = SequenceGRPO(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            beta=self.beta if micro_batch.has_reference else 0.0,  # a changed beta applies from the next rollout on
            entropy_coef=self.entropy_coef,
        )
        loss, metrics = objective(
            logps_BC,
            old_logps_BC=inputs.get("old_per_token_logps"),
            kl_BC=kl.per_token(micro_batch, logps_BC) if micro_batch.has_reference else None,
            entropies_BC=entropies_BC,
            mask_BC=mask_BC,
            advantages_B=inputs["advantages"],
            policy_weights_B=policy_weights(inputs, self._off_policy_mask(inputs, logps_BC, mask_BC)),
        )
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._record_metric("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
        if micro_batch.scores is not None:
            return loss / self._accumulation()
        totals = self.accelerator.reduce(torch.stack([torch.stack(pair) for pair in metrics.values()]))
        for name, (total, count) in zip(metrics, totals.tolist(), strict=True):
            self._record_metric(name, total / max(count, 1.0))
        return loss / self._accumulation()

    def _off_policy_mask(self, inputs: dict[str, Any], logps_BC: Tensor, mask_BC: Tensor) -> Tensor | None:
        """The rows that `off_policy_mask_threshold` keeps, shape (B, 1); None if it is not set."""
        if self.off_policy_mask_threshold is None:
            return None
        old_logps_BC = inputs.get("old_per_token_logps", logps_BC.detach())
        return self.get_off_policy_mask(
            advantages=inputs["advantages"].unsqueeze(1),
            per_token_logps=logps_BC,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logps_BC),
            mask=mask_BC,
            off_policy_threshold=self.off_policy_mask_threshold,
        )

    def _trl_loss(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """TRL's loss; if the KL to use is not TRL's own, it is added or logged here."""
        kl, mask_BC = self.parts.reference_kl, micro_batch.mask_BC
        if not micro_batch.has_reference:
            with replaced(self, beta=0.0):  # a changed beta applies from the next rollout on
                return super()._compute_loss(model, micro_batch.inputs)
        if kl.estimator == "k3" and self.beta != 0.0:
            return super()._compute_loss(model, micro_batch.inputs)
        with replaced(self, beta=0.0), results_of(self, "_get_per_token_logps_and_entropies") as scored:
            loss = super()._compute_loss(model, micro_batch.inputs)
        kl_BC = kl.per_token(micro_batch, scored[0][0])
        totals = self.accelerator.reduce(torch.stack([(kl_BC.detach() * mask_BC).sum(), mask_BC.sum().float()]))
        self._record_metric("kl", (totals[0] / totals[1].clamp(min=1.0)).item())
        if self.beta == 0.0:
            return loss
        return loss + self.beta * kl.mean_over_rows(kl_BC, mask_BC) / self._accumulation()

    def _accumulation(self) -> int:
        """The divisor of a loss, which transformers does not apply itself (`loss_is_scaled_for_ga`)."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # transformers averages over the steps of this session only
            total = self._resumed_losses.logged + self._resumed_losses.unlogged + self._total_loss_scalar
            logs["train_loss"] = total / max(self.state.global_step, 0.001)
        if self.model.training and self._timed_from_step is not None and "loss" in logs:
            steps = max(1, self.state.global_step - self._timed_from_step)
            self._timed_from_step = None
            logs |= {f"time/{phase}": seconds / steps for phase, seconds in self.parts.phases.pop().items()}
            logs["peak_memory_mb"] = round(peak_memory_mb(self.accelerator.device))
        with forgiving_stdout() if self.log_completions else nullcontext():  # TRL prints completions
            super().log(logs, start_time)

    def log_alone(self, metrics: dict[str, float]) -> None:
        """Log these values immediately, without flushing the running means as TRL's `log` does, and without replacing
        the step's own log."""
        is_due = self.control.should_log
        super(GRPOTrainer, self).log(metrics)
        self.control.should_log = is_due

    # Checkpoints, model card, Hub

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._checkpoints.writing(folder):
            super()._save_checkpoint(model, trial)
        self._last_save = self.state.global_step, len(self.state.log_history)
        self.last_checkpoint = folder
        self._checkpoints.rotate(folder, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card_or_warn(self, output_dir or self.args.output_dir)
        is_final = output_dir is None or Path(output_dir) == Path(self.args.output_dir)
        if is_final and REFERENCE in getattr(self.model, "peft_config", {}):
            shutil.rmtree(Path(self.args.output_dir, REFERENCE), ignore_errors=True)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if self.is_world_process_zero():
            write_card_or_warn(self, self.args.output_dir, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self._publisher.warn_about_strategy()
        with self._publisher.publishing():
            super().init_hf_repo(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._publisher.pushes_checkpoints:
            self._draw_curves()
            self.create_model_card()  # shows the curves
        with self._publisher.publishing():
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self._draw_curves()
        with self._publisher.publishing():
            return super().push_to_hub(*args, **kwargs)

    def _draw_curves(self) -> None:
        if self.is_world_process_zero():
            self._publisher.draw_curves()

    # The worst-case step

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """A context that restores the attributes of this trainer at its end, and in which nothing is sent to trackers.
        Gradients, random numbers and the states of the parts are not restored."""
        attributes, trackers = dict(self.__dict__), self.args.report_to
        self.args.report_to = []
        for name in CHANGED_IN_PLACE:
            setattr(self, name, copy.deepcopy(attributes[name]))
        self.parts = replace(self.parts, phases=PhaseTimer())
        try:
            yield
        finally:
            self.args.report_to = trackers
            self.__dict__.clear()
            self.__dict__.update(attributes)

    def roll_out_with(
        self,
        examples: list[dict[str, Any]],
        *,
        prompt_ids: Callable[[int], list[list[int]]],
        max_new_tokens: Callable[[int], list[int]],
        rewards: Callable[[int], Tensor],
    ) -> dict[str, Any]:
        """A rollout for these rows of the dataset with the given prompts, limits of new tokens and rewards. Each of the
        three functions takes the number of rows of one call. No completion is masked for being cut off."""
        self.mask_truncated_completions = self._masks_cut = False
        generate = self._generate_single_turn

        def generate_limited(ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            with self.parts.sampler.limited(max_new_tokens(len(ids))):
                return generate(ids, *args, **kwargs)

        with replaced(
            self,
            _tokenize_prompts=lambda prompts: (prompt_ids(len(prompts)), None, {}),
            _generate_single_turn=generate_limited,
            _calculate_rewards=lambda rows, *_: rewards(len(rows)),
        ):
            return self._generate_and_score_completions(examples)

    def sample_completion(self, prompt_ids: list[int]) -> list[int]:
        """Sample one completion of a prompt; both are token ids."""
        (completion_ids,), _ = self._generate_single_turn([prompt_ids], None, {}, self.num_generations)
        return completion_ids

    # Called by the parts

    def _record_metric(self, name: str, value: float) -> None:
        """Add a value to a metric, which is averaged until the next log."""
        is_training = self.model.training if self._rollout is None else self._rollout.is_training
        self._metrics["train" if is_training else "eval"][name].append(value)

    def _total_rewards(self, rewards_BF: Tensor) -> Tensor:
        """The weighted sum of each row's rewards, shape (..., F) -> (...), on the CPU: Apple's GPUs have no float64."""
        return combine_rewards(rewards_BF.cpu(), self.reward_weights.cpu())

    def _current_dataset(self) -> Any:
        return self.train_dataset

    def _current_step(self) -> int:
        return self.state.global_step

    def _train_metrics(self) -> dict[str, list[float]]:
        return self._metrics["train"]

    def _micro_batches(self) -> list[dict[str, Any]]:
        return self._buffered_inputs or []


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a run up to a step.

    Attributes:
        logged: their sum up to the last log.
        unlogged: their sum since then, in this process.
        last_logged_step: the optimizer step of the last log; None in a new run.
    """

    logged: float = 0.0
    unlogged: float = 0.0
    last_logged_step: int | None = None


class TrainerProgress:
    """State that TRL and transformers carry from step to step but do not save: the current rollout and the position in
    it, the table of completions, and the losses and metrics since the last log."""

    def __init__(self, trainer: GRPOExtTrainer):
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        losses = Losses(
            logged=trainer._total_loss_scalar,
            unlogged=trainer._tr_loss.item(),
            last_logged_step=trainer._globalstep_last_logged,
        )
        metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
        state: dict[str, Any] = {"step": trainer._step, "losses": asdict(losses), "metrics": as_json(metrics)}
        state["highest_reward"] = trainer._highest_reward
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) and trainer._buffered_inputs:
            logs: dict[str, Any] = {name: list(trainer._logs[name]) for name in LOGGED}
            for kind in LOGGED_BY_NAME:
                logs[kind] = {name: list(values) for name, values in trainer._logs[kind].items()}
            state |= {"rollout": trainer._buffered_inputs, "logs": as_json(logs)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer._step, trainer._resumed_losses = state["step"], Losses(**state["losses"])
        for name, values in state["metrics"].items():
            trainer._metrics["train"][name].extend(values)
        trainer._highest_reward = state["highest_reward"]
        trainer._buffered_inputs = state.get("rollout")
        for name in LOGGED if "logs" in state else ():
            trainer._logs[name].extend(state["logs"][name])
        for kind in LOGGED_BY_NAME if "logs" in state else ():
            for name, values in state["logs"][kind].items():
                trainer._logs[kind][name].extend(values)


def _joined(parts: list[Any]) -> Any:
    """One entry of all micro-batches: rows as a tensor or a list, or a value that they share."""
    first = parts[0]
    if isinstance(first, list):
        return [row for part in parts for row in part]
    return torch.cat(parts) if isinstance(first, Tensor) and first.ndim else first


def _in_order(value: Any, order: list[int], orders: dict[torch.device, Tensor]) -> Any:
    """The rows of an entry in this order, which `orders` has on each device."""
    if isinstance(value, list):
        return [value[row] for row in order]
    return value[orders[value.device]] if isinstance(value, Tensor) and value.ndim else value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
