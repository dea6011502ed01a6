"""Losses that are sums over rows: which ones are, and how to evaluate them in the middle of an update.

The gradient of such a loss in the scores of a row depends on no other row, so each chunk of a micro-batch can be run
forward and backward at once (`engine/loss_in_chunks.py`). TRL's loss function also records metrics, for which processes
wait for each other and the host waits for the device. In a chunk, collectives and `item()` are suppressed; a few reads
of values in TRL's metrics remain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grpo_ext.hooks import replaced

# Their normalisers are numbers of rows or tokens, which are known before the rows are scored.
SEPARABLE_LOSSES = frozenset(
    ("grpo_sequence", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
)


def why_inseparable(
    *, loss_type: str, has_aux_loss: bool, aux_loss_coef: float, top_entropy_quantile: float
) -> str | None:
    """The reason why the gradient of the loss in one row depends on other rows, as text for a log; None if it does
    not."""
    if loss_type not in SEPARABLE_LOSSES:
        return f"loss_type={loss_type!r} is not known to be a sum over completions"
    if has_aux_loss:
        return f"router_aux_loss_coef={aux_loss_coef}, and the load-balancing loss is not a sum over completions"
    if top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={top_entropy_quantile} is computed over the tokens of all completions"
    return None


@contextmanager
def without_collectives(accelerator: Accelerator) -> Iterator[None]:
    """A context in which this process does not wait for others: gathering and reducing return the tensor itself."""

    def own(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    with replaced(accelerator, gather=own, gather_for_metrics=own, reduce=own):
        yield


class WithoutReads(TorchFunctionMode):
    """A context in which `item()` returns 0.0, and does not wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0.0 if func is Tensor.item else func(*args, **(kwargs or {}))
