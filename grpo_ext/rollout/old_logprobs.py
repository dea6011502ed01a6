"""Old log-probs without a scoring pass: in float32, those of the sampler are used as long as they agree with scoring.

TRL scores the completions of a rollout once more if it serves several optimizer steps (`num_iterations > 1`, or
gradient accumulation that is not aligned with the rollout). Here, the first rollout is scored completely, and later
ones in one row per process. If that row disagrees, the whole rollout is scored.

In 16 bits, every rollout is scored, because sampler and scorer round differently. Measured on a CPU (the embedded
model, and a random llama of 6 layers and hidden size 256):

    differences in nats                             bfloat16            float32
    per token, standard deviation                   0.008 to 0.017
    per completion of 256 tokens, mean              0.12 to 0.24        0.0002 at most

In bfloat16, the ratio of an unchanged policy would be off by a factor of exp(0.12) to exp(0.24), which is the size of
the clipping range. Any tolerance loose enough for 16 bits would change the objective.

Legend: B rows, C completion tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ext.engine.scorer import RequestScores
from grpo_ext.rollout.types import SampledRows, padded_logps


class OldLogprobs:
    """Remembers from rollout to rollout whether the sampler has agreed with scoring.

    Args:
        gather_max: returns the maximum of a scalar over all processes.
    """

    def __init__(self, gather_max: Callable[[Tensor], float]):
        self._gather_max = gather_max
        self._agrees = False

    def __call__(
        self,
        rows: SampledRows,
        mask_BC: Tensor,
        score: Callable[[slice], RequestScores],
        *,
        step: int,
        tolerance: float,
    ) -> tuple[RequestScores, float]:
        """Old log-probs of a rollout, and the largest difference between sampler and scoring.

        Args:
            rows: the rows, with log-probs at sampling.
            mask_BC: 1 on completion tokens.
            score: scores a slice of the rows under the current policy.
            step: selects the row to score.
            tolerance: differences below it count as agreement, in nats per completion; 0 to score every rollout.

        Returns:
            Scores with log-probs only, and the difference in nats per completion.
        """
        assert rows.logps is not None
        sampled_BC = padded_logps(rows.logps, like=mask_BC)
        is_fresh_B1 = ~torch.tensor(rows.is_replayed, device=mask_BC.device).unsqueeze(1)

        def compare(which: slice) -> tuple[Tensor, float]:
            scored = score(which).logps_BC.where(is_fresh_B1[which], sampled_BC[which])
            gaps = ((scored - sampled_BC[which]) * mask_BC[which]).sum(dim=1).abs()
            return scored, self._gather_max(gaps.max())

        fresh = [row for row, is_replayed in enumerate(rows.is_replayed) if not is_replayed] or [0]
        everything, spot = slice(None), fresh[step % len(fresh)]
        logps_BC, gap = compare(slice(spot, spot + 1) if self._agrees else everything)
        agreed_before, self._agrees = self._agrees, gap < tolerance
        if agreed_before:  # only one row was scored
            logps_BC = sampled_BC if self._agrees else compare(everything)[0]
        scores = RequestScores(logps_BC=logps_BC, entropies_BC=None, kls_BC=None, hidden_BCH=None, aux_loss=None)
        return scores, gap

    def state_dict(self) -> dict[str, Any]:
        return {"agrees": self._agrees}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._agrees = state["agrees"]
