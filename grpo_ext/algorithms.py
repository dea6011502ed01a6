"""Named algorithms: the objectives of the literature as values of existing fields of `GRPOExtConfig`.

    GRPOExtConfig("outputs", **algorithm("dapo"))                        in Python
    GRPOExtConfig("outputs", **(algorithm("dapo") | {"beta": 0.01}))     with a value of your own
    grpo-ext train math --algorithm dapo --beta 0.01                     in a recipe; other flags win

An algorithm is its loss, its advantages, its clipping and its regularisation. Sampling, batch size and learning rate
are left to you: their values in the papers are for other models and other amounts of compute.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RewardFunc

NO_REGULARISATION = {"beta": 0.0, "entropy_coef": 0.0}


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm of the literature.

    Attributes:
        source: the paper.
        settings: values of fields of `GRPOExtConfig`.
        shapes_length: whether `overlong_punishment` is one of its rewards.
    """

    source: str
    settings: dict[str, Any]
    shapes_length: bool = False


ALGORITHMS = {
    # The defaults of this project: one ratio per completion, the population standard deviation, and a KL whose
    # gradient is corrected as in DeepSeek-V3.2, arXiv:2512.02556.
    "deepseek": Algorithm(
        source="sequence-level GRPO, DeepSeekMath, arXiv:2402.03300",
        settings={
            "loss_type": "grpo_sequence",
            "scale_rewards": "population",
            "epsilon": 0.2,
            "kl_estimator": "k3",
            "use_bias_correction_kl": True,
            "beta": 0.1,
            "entropy_coef": 0.01,
        },
    ),
    # One ratio per token, and the mean over the tokens of each completion. The paper gives no clipping range; 0.2 is
    # TRL's. TRL divides by the sample standard deviation, plus 1e-4, here and in all algorithms with "group".
    "grpo": Algorithm(
        source="token-level GRPO, DeepSeekMath, arXiv:2402.03300; beta of section 4.2",
        settings={
            "loss_type": "grpo",
            "scale_rewards": "group",
            "epsilon": 0.2,
            "kl_estimator": "k3",
            "use_bias_correction_kl": False,
            "beta": 0.04,
            "entropy_coef": 0.0,
        },
    ),
    # Clip-higher, dynamic sampling, the mean over all tokens, overlong filtering and shaping. Two differences: a group
    # is dead if its total rewards are equal (in the paper, if all or none are correct), and dynamic sampling ends after
    # `max_resample_rounds`.
    "dapo": Algorithm(
        source="DAPO, arXiv:2503.14476, sections 3 and 4.1",
        settings={
            "loss_type": "dapo",
            "scale_rewards": "group",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "dead_groups": "resample",
            "mask_truncated_completions": True,
        }
        | NO_REGULARISATION,
        shapes_length=True,
    ),
    # No division by the standard deviation, and the sum over tokens divided by `max_completion_length`.
    "dr_grpo": Algorithm(
        source="Dr. GRPO, arXiv:2503.20783",
        settings={"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2} | NO_REGULARISATION,
    ),
    # The length-normalised ratio of a completion. It differs from "grpo" only if a rollout serves several updates: the
    # paper has four (`steps_per_generation` of four times `gradient_accumulation_steps`).
    "gspo": Algorithm(
        source="GSPO, arXiv:2507.18071, section 5.1",
        settings={
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "scale_rewards": "group",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        }
        | NO_REGULARISATION,
    ),
    # The clipped ratio of each token is a constant weight, so no token loses its gradient. In TRL, `epsilon_high` is
    # the largest ratio itself, not its distance from 1, and there is no smallest one. 5.0 is TRL's recommendation.
    "cispo": Algorithm(
        source="CISPO, MiniMax-M1, arXiv:2506.13585; epsilon_high of ScaleRL, arXiv:2510.13786",
        settings={"loss_type": "cispo", "scale_rewards": "group", "epsilon_high": 5.0} | NO_REGULARISATION,
    ),
    # R_i less the mean of the other rewards is G / (G - 1) times R_i less the mean of all; this constant is left out.
    # The completion is one action: its log-prob is the sum over its tokens. The KL penalty in the reward is left out.
    "rloo": Algorithm(
        source="RLOO, arXiv:2402.14740, up to the constant G / (G - 1) of its advantages",
        settings={"loss_type": "grpo_sequence", "scale_rewards": "none", "epsilon": 0.2} | NO_REGULARISATION,
    ),
}


def algorithm(name: str) -> dict[str, Any]:
    """The settings of an algorithm, as keyword arguments of `GRPOExtConfig`.

    "dapo" also has a reward: `reward_funcs=[your_reward, overlong_punishment(args.max_completion_length)]`.

    Raises:
        ValueError: there is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} is unknown. Valid: {', '.join(map(repr, ALGORITHMS))}.")
    return dict(ALGORITHMS[name].settings)


def overlong_punishment(max_completion_length: int) -> "RewardFunc":
    """DAPO's soft punishment of long completions, TRL's `get_soft_overlong_punishment` with the paper's proportions.

    0 up to four fifths of `max_completion_length`, then falling linearly to -1 at `max_completion_length`. The paper
    has 20,480 tokens, of which the last 4,096 are punished (section 4.1).

    Args:
        max_completion_length: that of the config, in tokens.
    """
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(max_completion_length, round(max_completion_length / 5))


def describe_algorithm(name: str, settings: Any) -> str:
    """What an algorithm sets in a run, and which of its values were replaced, as one line.

    Args:
        settings: the `GRPOExtConfig` of the run.
    """
    kept = {key: value for key, value in algorithm(name).items() if getattr(settings, key) == value}
    replaced = {key: getattr(settings, key) for key in algorithm(name) if key not in kept}
    text = f"algorithm {name} ({ALGORITHMS[name].source}): {_listed(kept)}"
    if ALGORITHMS[name].shapes_length:
        text += "; one more reward: the soft punishment of long completions"
    return text + (f"; replaced by you: {_listed(replaced)}" if replaced else "")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
