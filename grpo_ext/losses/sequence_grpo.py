"""Sequence-level GRPO, `loss_type="grpo_sequence"` (DeepSeekMath, arXiv:2402.03300).

    J = mean over rows of [ min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta KL + entropy_coef H ],   loss = -J

In: log-probs of the completion tokens under policy and old policy, their KL to the reference (`kl.py`), entropies, a
mask and one advantage per row. Out: the loss, a scalar, and the sums behind the metrics.

    r  = exp(sum_t m (l - o))     ratio of the whole completion: a product over its tokens, not length-normalised
    KL = sum_t m kl_t             H = mean of the row's token entropies

Every term is a mean over rows, so an update does not depend on how its rows are split into micro-batches.

Legend: B rows, C completion tokens; m mask of model-written tokens; l, o log-probs under policy and old policy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Clamp on the log-ratio of a completion before exp: a policy far from the old one gets a large finite ratio (without
# gradient) instead of an overflow.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class SequenceGRPO:
    """The objective with its constants.

    Attributes:
        epsilon_low: the ratio is clipped below at 1 - epsilon_low if A < 0.
        epsilon_high: the ratio is clipped above at 1 + epsilon_high if A > 0.
        delta: upper bound of the ratio if A < 0 (two-sided clipping, INTELLECT-2, arXiv:2505.07291); None for no bound.
        beta: weight of the KL of a completion, in units of advantage per nat.
        entropy_coef: weight of the entropy bonus, in units of advantage per nat.
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    entropy_coef: float

    def __call__(
        self,
        logps_BC: Tensor,
        *,
        old_logps_BC: Tensor | None,
        kl_BC: Tensor | None,
        entropies_BC: Tensor,
        mask_BC: Tensor,
        advantages_B: Tensor,
        policy_weights_B: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The loss of these rows and its metrics.

        Args:
            logps_BC: log-probs under the policy, with gradient, shape (B, C).
            old_logps_BC: log-probs under the policy that sampled the completions; None if that is the current policy.
            kl_BC: KL of each token to the reference, with gradient; required if beta != 0.
            entropies_BC: token entropies in nats; need a gradient if entropy_coef != 0.
            mask_BC: 1 on the tokens that the model wrote, 0 on padding and on tool output.
            advantages_B: shape (B,).
            policy_weights_B: factor on the policy term of each row (importance correction of an inference engine,
                off-policy mask), shape (B,); None for 1.

        Returns:
            loss: scalar, the mean over rows of -J.
            metrics: name -> (sum, count), so that both can be summed over processes before dividing.
        """
        assert kl_BC is not None or self.beta == 0.0
        counts_BC = mask_BC.bool()
        tokens_B = counts_BC.sum(dim=1).to(logps_BC.dtype)
        has_tokens_B = (tokens_B > 0).to(logps_BC.dtype)  # a row without model-written tokens has no policy term
        # Mask before any exp: a huge difference on a token that does not count must not become inf * 0.
        logps_BC = logps_BC.where(counts_BC, 0.0)
        entropies_BC = entropies_BC.where(counts_BC, 0.0)
        old_logps_BC = logps_BC.detach() if old_logps_BC is None else old_logps_BC.where(counts_BC, 0.0)

        ratio_B = (logps_BC - old_logps_BC).sum(dim=1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped_B = ratio_B.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        # The cap only matters if A < 0: otherwise min() below takes the clipped ratio, which is smaller.
        capped_B = ratio_B if self.delta is None else ratio_B.clamp(max=self.delta)
        surrogate_B = torch.minimum(capped_B * advantages_B, clipped_B * advantages_B) * has_tokens_B
        if policy_weights_B is not None:
            surrogate_B = surrogate_B * policy_weights_B
        objective_B = surrogate_B

        rows = has_tokens_B.new_tensor(len(has_tokens_B))
        tokens = tokens_B.sum()
        metrics: dict[str, tuple[Tensor, Tensor]] = {}

        if kl_BC is not None:
            kl_B = kl_BC.where(counts_BC, 0.0).sum(dim=1)
            if self.beta != 0.0:
                objective_B = objective_B - self.beta * kl_B
            metrics["kl"] = (kl_B.sum(), tokens)
            metrics["kl_sequence"] = (kl_B.sum(), rows)

        entropy_B = entropies_BC.sum(dim=1) / tokens_B.clamp(min=1.0)
        if self.entropy_coef != 0.0:
            objective_B = objective_B + self.entropy_coef * entropy_B

        low_B = (ratio_B < 1 - self.epsilon_low) & (advantages_B < 0)
        high_B = (ratio_B > 1 + self.epsilon_high) & (advantages_B > 0)
        metrics["policy_loss"] = (-surrogate_B.sum(), rows)
        metrics["entropy"] = (entropies_BC.sum(), tokens)
        metrics["ratio"] = ((ratio_B * has_tokens_B).sum(), has_tokens_B.sum())
        metrics["clip_ratio/low_mean"] = (low_B.to(rows.dtype).sum(), rows)
        metrics["clip_ratio/high_mean"] = (high_B.to(rows.dtype).sum(), rows)
        metrics["clip_ratio/region_mean"] = ((low_B | high_B).to(rows.dtype).sum(), rows)
        return -objective_B.mean(), {name: (total.detach(), count) for name, (total, count) in metrics.items()}


def policy_weights(inputs: dict[str, Any], off_policy_mask_B1: Tensor | None) -> Tensor | None:
    """The factor that TRL's options apply to the policy term of each row, shape (B,); None for 1.

    Args:
        inputs: a micro-batch, with the correction of an inference engine if there is one.
        off_policy_mask_B1: 1 on rows that `off_policy_mask_threshold` keeps; None if that option is not set.
    """
    weights_B = None if off_policy_mask_B1 is None else off_policy_mask_B1.squeeze(1)
    if "importance_sampling_ratio" in inputs:
        correction_B = inputs["importance_sampling_ratio"].squeeze(1)
        weights_B = correction_B if weights_B is None else weights_B * correction_B
    return weights_B
