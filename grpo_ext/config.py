"""`GRPOExtConfig`: TRL's `GRPOConfig` with the defaults of the GRPO document, and only the fields that we add."""

from dataclasses import dataclass, field

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from grpo_ext.losses.kl import KL_ESTIMATORS
from grpo_ext.losses.temperature import TEMPERATURE_SCHEDULES
from grpo_ext.refusals import (
    DEAD_GROUPS,
    OVERLONG_PROMPTS,
    TRL_LOSS_TYPES,
    TRL_SCALE_REWARDS,
    explain_batch,
    refuse_impossible,
    refuse_words,
)


@dataclass
class GRPOExtConfig(GRPOConfig):
    """Configuration of [`GRPOExtTrainer`]. Every field of `trl.GRPOConfig` keeps its meaning.

    Redeclared, so that the defaults are the document's (G=8 and epsilon=0.2 are TRL's defaults already):
        loss_type: `"grpo_sequence"` (default) is the document's objective, the ratio of whole answers, see
            `grpo_ext/losses/sequence_grpo.py`. `"grpo"` and every other loss of TRL is computed by TRL itself.
        scale_rewards: `"population"` (default) divides by the standard deviation of the group with the count in the
            denominator. `"group"`, `"batch"` and `"none"` are TRL's.
        temperature: 0.8.
        beta: 0.1, the weight of the KL towards the starting model. With LoRA the reference costs no second model.
        learning_rate: 1e-5. LoRA usually wants more than full fine-tuning; 1e-5 to 1e-4 for 0.5B-7B models.
        entropy_coef: 0.01.
        max_grad_norm: 0.5.
        disable_dropout: True, so that the same tokens get the same log-probs in sampling and in the update.
        bf16, use_cpu: without an accelerator the run is on the CPU in float32; on a GPU without bfloat16, fp16.

    Added:
        share_prompt: True. Every prompt is read once for all of its completions, when they are drawn and when
            log-probs are computed (policy, old policy and reference). False is TRL's plain path. Where sharing cannot
            be exact, TRL's path is taken and the log says why.
        chunk_tokens: at most so many tokens carry a graph at once in the update, counting for each row its prompt too
            (attention copies the prompt's states per row); at least one row. Passes without a graph take up to eight
            times as many. None (default) for no bound; then, where `gradient_checkpointing` is on, the rows are still
            taken one at a time in its place. Recommended: None where a step fits, else prompt + completion tokens of
            as many rows as do; the result is the same for every value.
        kl_estimator: how the KL to the reference is estimated, for `loss_type` "grpo_sequence" and "grpo": `"k1"`,
            `"k2"`, `"k3"` (default) or `"exact"`, see `grpo_ext/losses/kl.py`. Recommended: "k3"; "exact" has no
            sampling noise, and costs one more pass of the answers through the LM head. TRL's `use_bias_correction_kl`
            (on) keeps its meaning.
        log_kl: False. Log `kl` where `beta` is 0 as well, for one reference pass a rollout.
        dead_groups: what to do with groups whose answers all earned the same reward. `"keep"` (default); `"skip"`, to
            leave them out of the update where they carry no gradient: `beta`, `entropy_coef` and the weight of a
            load-balancing loss are 0; `"resample"`, to draw other prompts in their place (as in DAPO, arXiv:2503.14476,
            section 3.2). Recommended: "skip" where it applies, for the same adapter in less time; "resample" where
            `frac_dead_groups` is above one half and sampling is cheap beside the update.
        max_resample_rounds: at most so many rounds of drawing again, 1 or more; 3 by default. Each costs the sampling
            of the groups that are still dead.
        num_generations_max: None (default), or more than `num_generations`: to prompts whose answers all earned the
            same reward, more are drawn, up to so many, without reading the prompt again; of those, the
            `num_generations` whose rewards differ most are trained on (max-variance down-sampling, PODS,
            arXiv:2504.13818), with advantages from the mean and deviation of all. What that does to the estimate: the
            gradient is no longer an unbiased one of the mean reward. Rare answers weigh more than their share (one
            right answer of 32 has an advantage of 5.6, and 7 of its 31 rivals stand for all), and prompts that the
            model nearly never, or nearly always, solves get steps that they would not get at `num_generations`.
            Recommended: None; two to four times `num_generations` where most groups are all wrong.
        temperature_schedule: `"constant"` (default), `"linear"` from `temperature` before the first step to
            `temperature_end` before the last, or `"entropy"`, a controller that holds the mean token entropy near
            `temperature_entropy_target`, between half and twice `temperature`. Recommended: "constant"; the others for
            runs whose answers all become alike too early.
        temperature_end: above 0, for the linear schedule. For example 1.0.
        temperature_entropy_target: nats a token, above 0, for the entropy schedule; start from the `entropy` that a
            run logs in its first steps.
        replay_fraction: 0 to 1, 0 by default. Up to this share of the groups of a rollout are mixed groups of recent
            steps, in the places of dead ones, each used once more, with the log-probs that it was drawn with as the old
            policy. Recommended: 0; 0.25 to 0.5 where sampling takes most of a step and half of the groups are dead.
        replay_max_age: optimizer steps, 1 or more, 4 by default. Older groups are dropped, and so are those with an
            answer whose probability has changed by more than a factor of e.
        reward_timeout: seconds, above 0, 10 by default, that one answer may take in a reward, which runs in worker
            processes (`grpo_ext/rollout/reward_workers.py`); a reward that judges all answers of a call together has
            that for each of them. Recommended: ten times what the slowest answer takes.
        reward_workers: worker processes of each reward that judges each answer by itself and says so
            (`scores_independently = True`): None (default) for as many as this training process has cores. Others have
            one, which is given whole calls. 0 calls every reward in the training process: for one that changes
            something there, a list or a model for example.
        max_prompt_tokens: tokens, 1 or more; None (default) for no limit but the model's own. Recommended: twice the
            length of a usual prompt: one prompt of 3,000 tokens can end a run that the others fit in.
        overlong_prompts: what to do with longer ones: `"error"` (default), or `"drop"` to leave these rows out, counted
            and printed. They are never cut, which would change the question.
        guards: True. Before the first step the settings, data, prompts and rewards are checked and one step of the
            largest shape is rehearsed (`grpo_ext/checks/preflight.py`), and the run is watched (`checks/watch.py`).
            False for test suites and for experiments that break these rules on purpose.
        dry_run: False. True stops after the checks and the rehearsal: `train()` returns without a step.
        kl_stop: nats a token, above 0: the run ends, and saves, where the KL to the reference (metric `kl`) is larger;
            None (default) for never. Needs `beta` above 0 or `log_kl`. Recommended: None; 0.5 for long runs that
            nobody watches.

    Raises:
        ValueError: for a combination that could not be trained as asked, naming what was received and what is valid.
    """

    loss_type: str = field(
        default="grpo_sequence",
        metadata={"help": f"'grpo_sequence' (the document's objective) or a loss of TRL: {', '.join(TRL_LOSS_TYPES)}."},
    )
    scale_rewards: str = field(
        default="population",
        metadata={"help": f"'population' (std with the count below) or one of TRL's: {', '.join(TRL_SCALE_REWARDS)}."},
    )
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature, above 0."})
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the KL towards the starting model; 0 switches the reference off."},
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate. LoRA: 1e-5 to 1e-4 for 0.5B-7B models."}
    )
    entropy_coef: float = field(default=0.01, metadata={"help": "Weight of the entropy bonus; 0 switches it off."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradients are scaled down to this norm."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout, LoRA's too, to 0: sampling and update then see the same model."},
    )
    share_prompt: bool = field(
        default=True, metadata={"help": "Read every prompt once for all of its completions; False: TRL's plain path."}
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that carry a graph at once in the update, for example 4096; None for no bound."},
    )
    kl_estimator: str = field(
        default="k3",
        metadata={"help": f"KL to the reference in 'grpo_sequence' and 'grpo': {', '.join(KL_ESTIMATORS)}."},
    )
    dead_groups: str = field(
        default="keep",
        metadata={"help": f"Groups whose answers all earned the same reward: {', '.join(DEAD_GROUPS)}."},
    )
    max_resample_rounds: int = field(
        default=3, metadata={"help": "With dead_groups='resample', draw dead groups anew at most so many times."}
    )
    num_generations_max: int | None = field(
        default=None,
        metadata={
            "help": "Draw up to so many answers where num_generations all earned the same reward, for example 32."
        },
    )
    temperature_schedule: str = field(
        default="constant",
        metadata={"help": f"How the temperature moves in the run: {', '.join(TEMPERATURE_SCHEDULES)}."},
    )
    temperature_end: float | None = field(
        default=None, metadata={"help": "Temperature before the last step, above 0, for the linear schedule."}
    )
    temperature_entropy_target: float | None = field(
        default=None, metadata={"help": "Nats a token, above 0, for the entropy schedule."}
    )
    log_kl: bool = field(
        default=False, metadata={"help": "Log the KL where beta is 0, too, for one reference pass a rollout."}
    )
    replay_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of a rollout's groups, 0 to 1, that may be mixed groups of recent steps."},
    )
    replay_max_age: int = field(
        default=4, metadata={"help": "Optimizer steps after which a group is not replayed any more."}
    )
    reward_timeout: float = field(
        default=10.0, metadata={"help": "Seconds that a reward may take for one answer, above 0."}
    )
    reward_workers: int | None = field(
        default=None,
        metadata={"help": "Worker processes of a reward; default: one a core; 0: none, in the training process."},
    )

    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; longer ones are an error, or left out."}
    )
    overlong_prompts: str = field(
        default="error", metadata={"help": f"Prompts above max_prompt_tokens: {', '.join(OVERLONG_PROMPTS)}."}
    )
    guards: bool = field(
        default=True, metadata={"help": "Check before the first step, rehearse the largest one, and watch the run."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Stop after the checks and the rehearsal."})
    kl_stop: float | None = field(
        default=None, metadata={"help": "Nats a token, above 0: end and save where the KL is larger."}
    )

    def __post_init__(self) -> None:
        refuse_words(self)
        self._fit_device()
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(explain_batch(self) or str(error)) from error
        refuse_impossible(self)

    def _fit_device(self) -> None:
        """Choose the precision that the device has, where the user left it open; TRL's default is bf16 everywhere."""
        if self.use_cpu or not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        elif self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available()
            self.fp16 = not self.bf16 and torch.cuda.is_available()
