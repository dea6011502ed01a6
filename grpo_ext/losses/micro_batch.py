"""The micro-batch that a loss is computed for.

Legend: B rows, C completion tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class MicroBatch:
    """TRL's tensors, and what the loss tells scoring and hears from it.

    Attributes:
        inputs: TRL's tensors; scoring may add to them.
        idle_rows: rows that carry no gradient.
        skip_idle: whether they are left out.
        exact_kls_BC: the exact KL to the reference, once the rows are scored and if it was asked for.
    """

    inputs: dict[str, Any]
    idle_rows: frozenset[int] = frozenset()
    skip_idle: bool = False
    exact_kls_BC: Tensor | None = None

    def scoring_options(self) -> dict[str, Any]:
        """What scoring needs to know about an update."""
        return {
            "ref_hidden_BCH": self.inputs.get("ref_hidden_states"),
            "idle_rows": self.idle_rows,
            "skip_idle": self.skip_idle,
        }

    @property
    def mask_BC(self) -> Tensor:
        """1 on the tokens that the model wrote, 0 on padding and on tokens of tools, shape (B, C)."""
        mask_BC = self.inputs["completion_mask"]
        return mask_BC * self.inputs["tool_mask"] if "tool_mask" in self.inputs else mask_BC
