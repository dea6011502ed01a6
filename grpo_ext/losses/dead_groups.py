"""Dead groups in the update: rows without an advantage, which are run apart from the others or not at all.

A micro-batch in which they are skipped gives the update of one in which they are kept, to the bit; for that, groups
without a gradient run apart from the others even if they are kept.

Legend: B rows, C completion tokens.
"""

from typing import Any

import torch
from torch import Tensor


class SkippedRows:
    """Stands in for the scores of skipped rows: a ratio of 1, and the mean entropy of the rows that were scored last."""

    def __init__(self) -> None:
        self._mean_entropy = 0.0  # nats per token

    def fill(
        self, logps_BC: Tensor, entropies_BC: Tensor, skipped: list[int], *, old_logps_BC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies with values for the skipped rows, which are 0 in what was scored."""
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
    """The rows of a micro-batch that the policy term does not move."""
    return frozenset((advantages == 0).nonzero().flatten().tolist())
