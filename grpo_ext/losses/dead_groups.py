"""Dead groups in the update: rows without an advantage run apart from the others, or are skipped.

Skipping them gives the same update as keeping them, bit for bit. This requires that groups without a gradient run apart
from the others even if they are kept. If anything but time would change, they are kept.

Legend: B rows, C completion tokens.
"""

from typing import Any

import torch
from torch import Tensor


class SkippedRows:
    """Fills in scores for skipped rows: a ratio of 1, and the mean entropy of the rows scored last."""

    def __init__(self) -> None:
        self._mean_entropy = 0.0  # nats per token

    def fill(
        self, logps_BC: Tensor, entropies_BC: Tensor, skipped: list[int], *, old_logps_BC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies with values for the skipped rows, which scoring leaves at 0.

        Args:
            logps_BC, entropies_BC: as scored.
            skipped: indices of the skipped rows.
            old_logps_BC: log-probs under the old policy; None if that is the current policy.
        """
        is_skipped_B1 = torch.zeros(len(logps_BC), 1, dtype=torch.bool, device=logps_BC.device)
        is_skipped_B1[skipped] = True
        scored = entropies_BC.detach()[~is_skipped_B1.squeeze(1)]
        if scored.any():
            self._mean_entropy = scored[scored > 0].mean().item()
        if old_logps_BC is not None:
            logps_BC = logps_BC + old_logps_BC * is_skipped_B1
        return logps_BC, entropies_BC + self._mean_entropy * is_skipped_B1

    def state_dict(self) -> dict[str, Any]:
        return {"mean_entropy": self._mean_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean_entropy = state["mean_entropy"]


def rows_without_advantage(advantages: Tensor) -> frozenset[int]:
    """The rows of a micro-batch whose advantages are 0: the policy term gives them no gradient.

    Args:
        advantages: shape (B,), or (B, C) if a subclass sets one per token.
    """
    is_zero_B = (advantages == 0).view(len(advantages), -1).all(dim=1)
    return frozenset(is_zero_B.nonzero().flatten().tolist())


def why_dead_groups_have_gradient(
    *,
    beta: float,
    log_kl: bool,
    entropy_coef: float,
    has_entropy_bonus: bool,
    aux_loss_coef: float,
    has_aux_loss: bool,
    top_entropy_quantile: float,
    temperature_schedule: str,
) -> str | None:
    """The reason why dead groups cannot be skipped, as text for a log; None if they can."""
    if beta != 0.0:
        return f"beta={beta}, and the KL of their answers has a gradient"
    if log_kl:
        return "log_kl=True needs the KL of their answers"
    if has_entropy_bonus:
        return f"entropy_coef={entropy_coef}, and the entropy of their answers has a gradient"
    if has_aux_loss:
        return f"router_aux_loss_coef={aux_loss_coef}, and their tokens count in the load-balancing loss"
    if top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={top_entropy_quantile} is computed over the tokens of all answers"
    if temperature_schedule == "entropy":
        return f"temperature_schedule={temperature_schedule!r} follows the entropy of all answers"
    return None
