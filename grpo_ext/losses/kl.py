"""How far the policy has moved from the reference, token by token.

In: log-probs of the sampled tokens under policy, old policy and reference. Out: one estimate per token of
KL(policy || reference) given the prefix, shape (B, C). No estimator includes the effect of a token on later states.

Let l and f be the log-probs under policy and reference, for tokens sampled from the policy (Schulman,
"Approximating KL divergence", 2020):

    estimator   value                     expected gradient as a loss term
    k1          l - f                     zero: it does not train; correct if multiplied by the ratio
    k2          (l - f)^2 / 2             correct
    k3          exp(f - l) - (f - l) - 1  that of KL(reference || policy); correct if multiplied by the ratio
    exact       sum over the vocabulary   correct, without sampling noise

k1 and k3 are unbiased estimates of the KL, k2 is not. k1 can be negative for a token; k2, k3 and exact cannot. The
engine computes `exact` from hidden states; the others are here.

Legend: B rows, C completion tokens.
"""

from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "exact")


def k1(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """l - f. Unbiased, with high variance; its gradient, that of l alone, has expectation zero."""
    return logps_BC - ref_logps_BC


def k2(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """(l - f)^2 / 2. Biased as a value; its gradient, (l - f) times that of l, is the KL's in expectation."""
    return (logps_BC - ref_logps_BC).square() / 2


def k3(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """exp(f - l) - (f - l) - 1 (DeepSeekMath, arXiv:2402.03300, equation 4). Unbiased, with low variance, never
    negative; its plain gradient, (1 - exp(f - l)) times that of l, is not the KL's."""
    difference_BC = ref_logps_BC - logps_BC
    return difference_BC.exp() - difference_BC - 1


def sampled_kl(
    estimator: str,
    logps_BC: Tensor,
    ref_logps_BC: Tensor,
    *,
    old_logps_BC: Tensor | None,
    mask_BC: Tensor,
    bias_corrected: bool,
) -> Tensor:
    """The estimated KL of each sampled token.

    Args:
        estimator: "k1", "k2" or "k3".
        logps_BC: log-probs under the policy, with gradient.
        ref_logps_BC: log-probs under the reference.
        old_logps_BC: log-probs under the policy that sampled the tokens; None if that is the current policy.
        mask_BC: 1 on tokens that count.
        bias_corrected: multiply by the token's ratio of policy to old policy, TRL's `use_bias_correction_kl`
            (DeepSeek-V3.2, arXiv:2512.02556). For k1 and k3 the ratio is differentiated, which makes the gradient
            correct on and off policy. For k2, whose gradient is correct on policy already, the ratio is a weight.

    Returns:
        Shape (B, C), 0 where the mask is 0.
    """
    # Mask before any exp: a huge difference on a token that does not count must not become inf * 0.
    counts_BC = mask_BC.bool()
    logps_BC, ref_logps_BC = logps_BC.where(counts_BC, 0.0), ref_logps_BC.where(counts_BC, 0.0)
    kl_BC = {"k1": k1, "k2": k2, "k3": k3}[estimator](logps_BC, ref_logps_BC)
    if not bias_corrected:
        return kl_BC
    old_logps_BC = logps_BC.detach() if old_logps_BC is None else old_logps_BC.where(counts_BC, 0.0)
    ratio_BC = (logps_BC - old_logps_BC).exp()
    return kl_BC * (ratio_BC.detach() if estimator == "k2" else ratio_BC)
