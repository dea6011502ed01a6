"""How far the policy has moved from the reference, token by token.

In: log-probabilities of the sampled tokens under policy and reference. Out: one KL estimate a token, shape (B, C).
A KL of the policy given the prefix; none of the estimators carries the effect of a token on later states.

Legend: B rows, C completion tokens.
"""

from torch import Tensor

KL_ESTIMATORS = ("k3",)


def k3(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """exp(f - l) - (f - l) - 1, with l and f the log-probs under policy and reference: never negative, 0 where equal.

    Unbiased for samples of the policy itself (Schulman, "Approximating KL divergence", 2020; DeepSeekMath,
    arXiv:2402.03300, equation 4). As a loss term its plain gradient is biased; multiplied by the differentiable ratio
    pi/pi_old (TRL's `use_bias_correction_kl`, on by default) the on-policy gradient is the right one.
    """
    difference_BC = ref_logps_BC - logps_BC
    return difference_BC.exp() - difference_BC - 1
