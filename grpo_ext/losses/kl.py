"""How far the policy has moved from the reference, token by token.

In: log-probs of the sampled tokens under policy, old policy and reference. Out: one KL estimate a token, shape (B, C),
of KL(policy || reference) given the prefix; none of the estimators carries the effect of a token on later states.

With l and f the log-probs under policy and reference, and samples of the policy itself (Schulman, "Approximating KL
divergence", 2020):

    estimator   value                     its gradient as a loss term, in the mean
    k1          l - f                     zero: it does not train; times the ratio, the right one
    k2          (l - f)^2 / 2             the right one
    k3          exp(f - l) - (f - l) - 1  that of the forward KL(reference || policy); times the ratio, the right one
    exact       sum over the vocabulary   the right one, without the noise of sampling

k1 and k3 have the KL as their mean, k2 has not. k1 may be negative for a token, k2, k3 and exact never are. `exact` is
computed from hidden states, by the engine; the others here.

Legend: B rows, C completion tokens.
"""

from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "exact")


def k1(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """l - f. Unbiased, and of high variance; its gradient, that of l alone, is zero in the mean."""
    return logps_BC - ref_logps_BC


def k2(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """(l - f)^2 / 2. Biased as a value; its gradient, (l - f) times that of l, is the KL's in the mean."""
    return (logps_BC - ref_logps_BC).square() / 2


def k3(logps_BC: Tensor, ref_logps_BC: Tensor) -> Tensor:
    """exp(f - l) - (f - l) - 1 (DeepSeekMath, arXiv:2402.03300, equation 4). Unbiased, of low variance, never negative;
    its plain gradient, (1 - exp(f - l)) times that of l, is not the KL's."""
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
    """The KL of each token as `estimator` has it, from the tokens that were sampled.

    Args:
        estimator: "k1", "k2" or "k3".
        logps_BC, ref_logps_BC: under policy (with gradient) and reference.
        old_logps_BC: under the policy that drew the tokens; None where that is this very policy.
        mask_BC: 1 on tokens that count.
        bias_corrected: multiply by the token's ratio of policy and old policy, TRL's `use_bias_correction_kl`
            (DeepSeek-V3.2, arXiv:2512.02556). For k1 and k3 the ratio is differentiated, which makes the gradient the
            right one on and off policy; for k2, whose gradient is right on policy as it is, the ratio is a weight.

    Returns:
        Shape (B, C), 0 where the mask is.
    """
    # Masked before any exp: a huge difference on a token that does not count must not become inf * 0.
    counts_BC = mask_BC.bool()
    logps_BC, ref_logps_BC = logps_BC.where(counts_BC, 0.0), ref_logps_BC.where(counts_BC, 0.0)
    kl_BC = {"k1": k1, "k2": k2, "k3": k3}[estimator](logps_BC, ref_logps_BC)
    if not bias_corrected:
        return kl_BC
    old_logps_BC = logps_BC.detach() if old_logps_BC is None else old_logps_BC.where(counts_BC, 0.0)
    ratio_BC = (logps_BC - old_logps_BC).exp()
    return kl_BC * (ratio_BC.detach() if estimator == "k2" else ratio_BC)
