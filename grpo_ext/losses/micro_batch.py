"""The micro-batch that a loss is computed for.

Legend: B rows, C completion tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext.losses.dead_groups import rows_without_advantage

if TYPE_CHECKING:
    from grpo_ext.engine.batch import Scores


@dataclass(kw_only=True)
class MicroBatch:
    """TRL's tensors, the options that the loss passes to scoring, and the exact KL that scoring returns.

    Attributes:
        inputs: TRL's tensors; scoring may add further entries.
        separates_idle: whether rows without an advantage have no gradient, and run apart from the others.
        skip_idle: whether those rows are skipped.
        loss: the loss of the scores of all rows, if scoring may compute its gradient in chunks.
        scores: the scores to use instead of scoring the rows.
        loss_gradient: what scoring returned, see `Scores`.
        exact_kls_BC: the exact KL to the reference; None before scoring, or if it was not requested.
    """

    inputs: dict[str, Any]
    separates_idle: bool = False
    skip_idle: bool = False
    loss: "Callable[[Scores], Tensor] | None" = None
    scores: "Scores | None" = None
    loss_gradient: Tensor | None = None
    exact_kls_BC: Tensor | None = None

    def scoring_options(self) -> dict[str, Any]:
        """The fields of a `ScoringRequest` that only an update sets."""
        return {
            "ref_hidden_BCH": self.inputs.get("ref_hidden_states"),
            "idle_rows": rows_without_advantage(self.inputs["advantages"]) if self.separates_idle else frozenset(),
            "skip_idle": self.skip_idle,
            "loss": self.loss,
        }

    def has_rows(self, completion_ids_BC: Tensor) -> bool:
        """Whether these completions are the rows of this micro-batch."""
        own_BC = self.inputs["completion_ids"]
        return own_BC.shape == completion_ids_BC.shape and bool(torch.equal(own_BC, completion_ids_BC))

    @property
    def has_reference(self) -> bool:
        """Whether the reference has scored this micro-batch."""
        return "ref_per_token_logps" in self.inputs

    @property
    def mask_BC(self) -> Tensor:
        """1 on the tokens that the model wrote, 0 on padding and on tool output, shape (B, C)."""
        mask_BC = self.inputs["completion_mask"]
        return mask_BC * self.inputs["tool_mask"] if "tool_mask" in self.inputs else mask_BC
