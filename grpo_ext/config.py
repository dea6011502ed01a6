"""`GRPOExtConfig`: TRL's `GRPOConfig` with defaults for sequence-level GRPO, and the fields that this project adds."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from grpo_ext.losses.kl import KL_ESTIMATORS
from grpo_ext.losses.temperature import TEMPERATURE_SCHEDULES
from grpo_ext.machine import supports_bfloat16
from grpo_ext.refusals import (
    CURRICULA,
    DEAD_GROUPS,
    OVERLONG_PROMPTS,
    TRL_LOSS_TYPES,
    TRL_SCALE_REWARDS,
    explain_batch,
    refuse_impossible,
    refuse_words,
    token_option,
)

logger = logging.getLogger(__name__)

# The fields of TRL with another default in this project: the default here, and TRL's.
DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo_sequence",
    "scale_rewards": "population",
    "beta": 0.1,
    "learning_rate": 1e-5,
    "temperature": 0.8,
    "entropy_coef": 0.01,
    "max_grad_norm": 0.5,
    "disable_dropout": True,
}
# Added fields that are None until they are resolved, which shows whether the user set them.
RESOLVED_DEFAULTS: dict[str, Any] = {"dead_groups": "skip"}
TRL_DEFAULTS: dict[str, Any] = {name: GRPOConfig.__dataclass_fields__[name].default for name in DEFAULTS}


@dataclass
class GRPOExtConfig(GRPOConfig):
    """Configuration of `GRPOExtTrainer`. Every field of `trl.GRPOConfig` keeps its meaning.

    The changed defaults are chosen for sequence-level GRPO (DeepSeekMath, arXiv:2402.03300); num_generations=8 and
    epsilon=0.2 are TRL's defaults already.

    Changed defaults:
        loss_type: `"grpo_sequence"` is sequence-level GRPO, with one probability ratio per completion, see
            `grpo_ext/losses/sequence_grpo.py`. `"grpo"` and every other loss of TRL is computed by TRL itself. None
            (default) selects "grpo_sequence", or TRL's default if an option that acts on single tokens is set
            (`use_adaptive_entropy`, `top_entropy_quantile`, `importance_sampling_level`,
            `vllm_importance_sampling_mode`). Recommended: None; `"dapo"` if a rollout serves several updates in 16
            bits.
        scale_rewards: how rewards are normalised to advantages. `"population"` divides by the population standard
            deviation of the group. `"group"`, `"batch"` and `"none"` are TRL's. None (default) selects "population",
            or "group" if `multi_objective_aggregation` is "normalize_then_sum". Recommended: None.
        temperature: sampling temperature, above 0; 0.8 by default. Recommended: 0.8 to 1.0.
        beta: weight of the KL to the starting model, in units of advantage per nat, 0 or more; 0.1 by default. 0 turns
            the reference off. With LoRA, the reference needs no second model. Recommended: 0.1; 0 to save the reference
            pass.
        learning_rate: peak learning rate, above 0; 1e-5 by default. LoRA usually needs more than full fine-tuning.
            Recommended: 1e-5 to 1e-4 for LoRA on models of 0.5B to 7B.
        entropy_coef: weight of the entropy bonus, in units of advantage per nat, 0 or more; 0.01 by default. 0 turns
            the bonus off. Recommended: 0.01; 0 together with `beta=0`, so that dead groups are skipped.
        max_grad_norm: maximum norm of the gradient; larger gradients are scaled down to it. 0 turns clipping off; 0.5
            by default. Recommended: 0.5 to 1.0.
        disable_dropout: True (default) sets every dropout to 0, including LoRA's, so that sampling and update give the
            same log-probs to the same tokens. Recommended: True.
        bf16, use_cpu: chosen to fit the device unless they are set. Without an accelerator, the run is on the CPU in
            float32; on a GPU without bfloat16, in fp16. Recommended: leave both unset.

    Added fields:
        share_prompt: True (default) prefills every prompt once for all of its completions, in sampling and in scoring
            (policy, old policy and reference). False uses TRL's plain path. If sharing cannot be exact, TRL's path is
            used as well, and the log says why. Recommended: True.
        chunk_tokens: maximum number of tokens with an autograd graph at any one time in the update, 1 or more. A row
            counts with its prompt, because attention copies the prompt's KV cache per row. A chunk has at least one
            row; prompts and completions that are longer than a chunk are cut along their tokens. Passes without
            gradients use chunks of up to eight times that size. `"auto"` (default) for as many tokens as memory allows,
            measured in the worst-case step, or on the first micro-batch of a run without that step
            (`grpo_ext/checks/chunk_size.py`); a resumed run keeps the size. None for no limit; if
            `gradient_checkpointing` is on, rows are then processed one at a time instead. The result is the same for
            every value. After an out-of-memory error, the run goes on with chunks of half the size, which a log line
            gives. Recommended: "auto"; less than prompt plus completion if even one row does not fit.
        kl_estimator: estimator of the KL to the reference for `loss_type` "grpo_sequence" and "grpo": `"k1"`, `"k2"`,
            `"k3"` (default) or `"exact"`, see `grpo_ext/losses/kl.py`. "exact" has no sampling noise and costs one more
            pass of the completions through the LM head; `use_bias_correction_kl`, which corrects a sampled KL, has no
            effect on it. Recommended: "k3".
        log_kl: False by default. True logs `kl` even if `beta` is 0; this costs one reference pass per rollout.
            Recommended: False; True to watch, with `beta=0`, how far the policy moves.
        dead_groups: what to do with groups whose completions all earned the same reward. `"skip"` (default) excludes
            them from the update if that gives the same adapter: `beta`, `entropy_coef` and the weight of a
            load-balancing loss are 0, prompts are shared, no other option uses their scores, and the loss is not
            overridden. The metrics `entropy`, `ratio` and `clip_ratio` then describe the other groups only. If the
            adapter would differ, dead groups are kept, and the log says why if "skip" was set explicitly. `"keep"`
            always keeps them. `"resample"` replaces them with groups of other prompts (as in DAPO, arXiv:2503.14476,
            section 3.2). Recommended: "skip"; "resample" if `frac_dead_groups` is above 0.5 and sampling is cheap
            compared with the update.
        max_resample_rounds: maximum number of resampling rounds per rollout with `dead_groups="resample"`, 1 or more;
            3 by default. Each round samples a group for every group that is still dead. Recommended: 3.
        num_generations_max: maximum number of completions per prompt, more than `num_generations`; None (default) for
            no extra completions. Prompts whose completions all earned the same reward get more completions, up to this
            number, without another prefill. The `num_generations` whose rewards differ most are trained on
            (max-variance down-sampling, PODS, arXiv:2504.13818), with advantages from the mean and standard deviation
            of all. The gradient is then no longer an unbiased estimate of that of the mean reward. Rare completions get
            more weight than their share: one right completion of 32 has an advantage of 5.6, and 7 of its 31 rivals
            represent all of them. Prompts that the model almost never, or almost always, solves get updates that they
            would not get with `num_generations` completions. Recommended: None; two to four times `num_generations` if
            most groups are all wrong.
        curriculum: which training problems a rollout is made of. `"off"` (default): the order of the data loader, as in
            TRL. `"pools"`: problems that are almost always or almost never solved are set aside. The others are sampled
            in proportion to how informative a group at their pass rate is, after every problem was sampled once
            (`grpo_ext/rollout/pools.py`). The number of steps is unchanged. Needs a data set that can be indexed.
            Recommended: "off"; "pools" if most groups are dead and the run passes over the
            data more than once, or has `start_pass_rates`.
        start_pass_rates: pass rates of the training problems under the starting model, 0 to 1, for
            `curriculum="pools"`; problems that have one skip the first pass. Either a column of the training data (in
            a column named `difficulty`, 1 is the hardest) or a file that `grpo-ext eval --samples 8 --save_pass_rates`
            wrote. None (default) for no start values. Recommended: None; a file if the data is larger than a run.
        temperature_schedule: `"constant"` (default); `"linear"`, from `temperature` before the first step to
            `temperature_end` before the last; or `"entropy"`, a controller that keeps the mean token entropy near
            `temperature_entropy_target`, with a temperature between half and twice `temperature`. Recommended:
            "constant"; the others if completions become alike too early in a run.
        temperature_end: final temperature of the linear schedule, above 0; None (default) for the other schedules.
            Recommended: above `temperature`, for example 1.0.
        temperature_entropy_target: target of the entropy schedule in nats per token, above 0; None (default) for the
            other schedules. Recommended: close to the `entropy` that a run logs in its first steps.
        replay_fraction: maximum share of a rollout's groups that are replayed, 0 to 1; 0 by default. Mixed groups of
            recent steps replace dead ones. Each is reused once, with its log-probs at sampling as the old policy.
            Recommended: 0; 0.25 to 0.5 if sampling takes most of a step and half of the groups are dead.
        replay_max_age: maximum age of a replayed group in optimizer steps, 1 or more; 4 by default. Groups with a
            completion whose probability has changed by more than a factor of e are not replayed either. Recommended: 4.
        reward_timeout: seconds, above 0; 10 by default. For a reward in worker processes, its time limit per
            completion; the limit of a whole call is this times the number of its completions. For a reward in the
            training process, where a call cannot be interrupted, the time after which a running call is reported in the
            log. Recommended: ten times the time of the slowest completion.
        reward_workers: number of worker processes for reward functions, 0 or more. None (default) calls every reward
            function in the training process, as TRL does, except for those that declare `scores_independently = True`
            (`math_answer_reward` and `logic_reward` do). Those get one completion at a time in up to four workers, at
            most one per core, so that a hang or a crash costs one completion. 1 or more runs every reward function in
            workers: those that declare it share this number of workers; any other one runs whole calls in a worker of
            its own, which has a copy of the reward and keeps its state. 0 runs none in workers. Recommended: None;
            `isolated(reward)` of `grpo_ext.rewards` for a single reward that may hang or crash
            (`rewards/workers/pool.py`).
        max_prompt_tokens: maximum length of a prompt in tokens, 1 or more; None (default) for the model's own limit.
            Recommended: twice the usual length, because a single prompt of 3,000 tokens can exhaust the memory.
        overlong_prompts: what to do with prompts of more than `max_prompt_tokens`: `"error"` (default), or `"drop"`,
            which removes these rows and logs their number. Prompts are never truncated, because that would change the
            question. Recommended: "error"; "drop" once you know what is removed.
        guards: True (default) checks settings, data, prompts and rewards before the first step, runs a step of the
            largest shape as a test (`grpo_ext/checks/preflight.py`), and watches the run (`checks/watch.py`).
            Recommended: True; False for test suites and for experiments that break these rules on purpose.
        dry_run: False by default. True stops after these checks: `train()` returns without a step. Recommended: True
            once before a long run.
        kl_stop: nats per token, above 0. If the KL to the reference (metric `kl`) exceeds it, the run saves and ends.
            None (default) for no limit. Needs `beta` above 0 or `log_kl`. Recommended: None; 0.5 for long unattended
            runs.
        max_hours: hours, above 0, fractions allowed. The first step that ends this long after the trainer was built is
            the last one of the session: it is saved, and the run ends; `resume_from_checkpoint="last"` continues it.
            None (default) for no limit. Recommended: None; the limit of a batch job, less the time of one step, of a
            save and of the report.
        accept_changes: names of settings, separated by commas, that may differ from those of the checkpoint that the
            run resumes from, for example "learning_rate,reward_funcs"; None (default) for none. The message that
            refuses a checkpoint gives the names. The run continues with the new values, and `run.json` records them.
            Recommended: None.

    Raises:
        ValueError: the settings cannot be trained together. The message gives the value received and a valid one.
    """

    loss_type: str = field(
        default=None,  # type: ignore[assignment]  # resolved in __post_init__
        metadata={
            "help": "Loss: 'grpo_sequence' (sequence-level GRPO, one ratio per completion; default unless another "
            f"option needs a loss of TRL) or a loss of TRL: {', '.join(TRL_LOSS_TYPES)}. Recommended: the default; "
            "'dapo' if a rollout serves several updates in 16 bits."
        },
    )
    scale_rewards: str = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Normalisation of rewards: 'population' (divide by the group's population standard deviation; "
            "default unless another option needs a value of TRL) or one of TRL's: "
            f"{', '.join(TRL_SCALE_REWARDS)}. Recommended: the default."
        },
    )
    temperature: float = field(
        default=DEFAULTS["temperature"],
        metadata={"help": "Sampling temperature, above 0. Recommended: 0.8 to 1.0."},
    )
    beta: float = field(
        default=DEFAULTS["beta"],
        metadata={
            "help": "Weight of the KL to the starting model, in advantage per nat, 0 or more; 0 turns the reference "
            "off. Recommended: 0.1; 0 to save the reference pass."
        },
    )
    learning_rate: float = field(
        default=DEFAULTS["learning_rate"],
        metadata={"help": "Peak learning rate, above 0. Recommended: 1e-5 to 1e-4 for LoRA on models of 0.5B to 7B."},
    )
    entropy_coef: float = field(
        default=DEFAULTS["entropy_coef"],
        metadata={
            "help": "Weight of the entropy bonus, in advantage per nat, 0 or more; 0 turns it off. Recommended: 0.01; "
            "0 together with beta=0, so that dead groups are skipped."
        },
    )
    max_grad_norm: float = field(
        default=DEFAULTS["max_grad_norm"],
        metadata={
            "help": "Maximum norm of the gradient; larger gradients are scaled down to it; 0 turns clipping off. "
            "Recommended: 0.5 to 1.0."
        },
    )
    disable_dropout: bool = field(
        default=DEFAULTS["disable_dropout"],
        metadata={
            "help": "Set every dropout to 0, including LoRA's, so that sampling and update see the same model. "
            "Recommended: true."
        },
    )
    share_prompt: bool = field(
        default=True,
        metadata={
            "help": "Prefill every prompt once for all of its completions; false uses TRL's plain path. Recommended: "
            "true."
        },
    )
    chunk_tokens: int | str | None = field(
        default="auto",
        metadata={
            "help": "Maximum number of tokens with an autograd graph at any one time in the update, 1 or more; `auto` "
            "for as many as memory allows; `none` for no limit. Recommended: auto; less than prompt plus completion if "
            "even one row does not fit."
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={
            "help": "Estimator of the KL to the reference, for 'grpo_sequence' and 'grpo': "
            f"{', '.join(KL_ESTIMATORS)}. Recommended: k3."
        },
    )
    dead_groups: str = field(
        default=None,  # type: ignore[assignment]  # resolved in __post_init__
        metadata={
            "help": "What to do with groups whose completions all earned the same reward: "
            f"{', '.join(DEAD_GROUPS)}. Recommended: skip, the default, which keeps them if the adapter would differ "
            "without them; resample if most groups are dead."
        },
    )
    max_resample_rounds: int = field(
        default=3,
        metadata={
            "help": "Maximum number of resampling rounds per rollout with dead_groups='resample', 1 or more. "
            "Recommended: 3."
        },
    )
    num_generations_max: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of completions of a prompt whose completions all earned the same reward, more than "
            "num_generations; unset for no extra completions. Recommended: unset; two to four times num_generations "
            "if most groups are all wrong."
        },
    )
    curriculum: str = field(
        default="off",
        metadata={
            "help": f"Which training problems a rollout is made of: {', '.join(CURRICULA)}. 'pools' sets aside those "
            "that are almost always or almost never solved. Recommended: off; pools if most groups are dead and the "
            "run passes over the data more than once, or has start_pass_rates."
        },
    )
    start_pass_rates: str | None = field(
        default=None,
        metadata={
            "help": "Pass rates of the training problems under the starting model, 0 to 1, for curriculum='pools': a "
            "column of the training data (in a column named difficulty, 1 is the hardest), or a file of "
            "`grpo-ext eval --save_pass_rates`. Recommended: unset; a file if the data is larger than a run."
        },
    )
    temperature_schedule: str = field(
        default="constant",
        metadata={
            "help": f"Schedule of the sampling temperature: {', '.join(TEMPERATURE_SCHEDULES)}. Recommended: constant; "
            "the others if completions become alike too early in a run."
        },
    )
    temperature_end: float | None = field(
        default=None,
        metadata={
            "help": "Final temperature of the linear schedule, above 0. Recommended: above temperature, for example "
            "1.0."
        },
    )
    temperature_entropy_target: float | None = field(
        default=None,
        metadata={
            "help": "Target of the entropy schedule in nats per token, above 0. Recommended: close to the entropy that "
            "a run logs in its first steps."
        },
    )
    log_kl: bool = field(
        default=False,
        metadata={
            "help": "Log the KL even if beta is 0; costs one reference pass per rollout. Recommended: false; true to "
            "watch, with beta=0, how far the policy moves."
        },
    )
    replay_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Maximum share of a rollout's groups, 0 to 1, in which mixed groups of recent steps replace dead "
            "ones. Recommended: 0; 0.25 to 0.5 if sampling takes most of a step and half of the groups are dead."
        },
    )
    replay_max_age: int = field(
        default=4,
        metadata={"help": "Maximum age of a replayed group in optimizer steps, 1 or more. Recommended: 4."},
    )
    reward_timeout: float = field(
        default=10.0,
        metadata={
            "help": "Seconds, above 0: time limit per completion in worker processes; in the training process, the "
            "time after which a running call is reported. Recommended: ten times the time of the slowest completion."
        },
    )
    reward_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of worker processes for reward functions, for example 2; 0 for none. Unset: up to 4, for "
            "the rewards that declare scores_independently. Recommended: unset."
        },
    )

    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of a prompt in tokens, 1 or more; unset for the model's own limit. Recommended: "
            "twice the usual length."
        },
    )
    overlong_prompts: str = field(
        default="error",
        metadata={
            "help": f"What to do with prompts of more than max_prompt_tokens: {', '.join(OVERLONG_PROMPTS)}. "
            "Recommended: error; drop once you know what is removed."
        },
    )
    guards: bool = field(
        default=True,
        metadata={
            "help": "Check the run before its first step, test a step of the largest shape, and watch the training. "
            "Recommended: true."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Stop after the checks and the test step, without training. Recommended: true once before a long "
            "run."
        },
    )
    kl_stop: float | None = field(
        default=None,
        metadata={
            "help": "Nats per token, above 0: save and end the run if the KL to the reference exceeds it; unset for no "
            "limit. Recommended: unset; 0.5 for long unattended runs."
        },
    )
    max_hours: float | None = field(
        default=None,
        metadata={
            "help": "Hours, above 0, fractions allowed: after this time, save and end the run at the end of a step; "
            "unset for no limit. Recommended: unset; the limit of a batch job, less the time of one step, of a save "
            "and of the report."
        },
    )
    accept_changes: str | None = field(
        default=None,
        metadata={
            "help": "Settings, separated by commas, that may differ from those of the checkpoint to resume from, for "
            "example learning_rate,reward_funcs; unset for none. Recommended: unset."
        },
    )

    def __post_init__(self) -> None:
        refuse_words(self)
        if isinstance(self.chunk_tokens, str):  # from a command line
            self.chunk_tokens = _number_or_none(self.chunk_tokens)
        self.asks_to_skip = self.dead_groups == "skip"
        if self.dead_groups is None:
            self.dead_groups = RESOLVED_DEFAULTS["dead_groups"]
        self._resolve_objective()
        self._fit_device()
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(explain_batch(self) or str(error)) from error
        refuse_impossible(self)

    def _resolve_objective(self) -> None:
        """Choose the loss and the normalisation that the user left open, so that no default excludes another option."""
        if self.loss_type is None:
            option = token_option(self)
            self.loss_type = DEFAULTS["loss_type"] if option is None else TRL_DEFAULTS["loss_type"]
            if option is not None:
                name, value, _ = option
                logger.warning(
                    f"{name}={value!r} acts on single tokens, so loss_type is TRL's default, {self.loss_type!r}."
                )
        if self.scale_rewards is None:
            sums = self.multi_objective_aggregation == "sum_then_normalize"
            self.scale_rewards = DEFAULTS["scale_rewards"] if sums else TRL_DEFAULTS["scale_rewards"]
            if not sums:
                logger.warning(
                    f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises each reward on "
                    f"its own, so scale_rewards is TRL's default, {self.scale_rewards!r}."
                )

    def changed_defaults(self) -> list[str]:
        """The fields that have this project's default instead of TRL's, each as text with both values."""
        changed = [
            f"{name}={value!r} (TRL: {TRL_DEFAULTS[name]!r})"
            for name, value in DEFAULTS.items()
            if getattr(self, name) == value
        ]
        return changed + (["bf16=False (TRL: True)"] if self.use_cpu and not self.bf16 else [])

    def _fit_device(self) -> None:
        """Choose a precision that the device supports, unless the user chose one. TRL's default is bf16 everywhere."""
        if self.use_cpu or not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        elif self.bf16 is None and not self.fp16:
            self.bf16 = supports_bfloat16()
            self.fp16 = not self.bf16 and torch.cuda.is_available()


def _number_or_none(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if text.isdigit() else text
