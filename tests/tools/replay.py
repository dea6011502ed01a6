"""A CUDA graph without CUDA: records the operations of a function, and replays them on the same tensors.

As in a graph, Python runs only while recording. Each replay repeats the recorded operations in order, with the tensors
and numbers of that time, and leaves its results in the tensors of that time. Reading a value while recording is an
error, as it is during the capture of a graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The replay of a function of tensors. The function runs once, which a capture does not do."""
    with _Recorder() as recorder:
        output = function()

    def replay() -> Tensor:
        for operation in recorder.operations:
            operation()
        return output

    return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS_VALUES or _indexes_by_mask(name, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        aliases = any(value.alias_info is not None for value in func._schema.returns)  # views and in-place operations
        writes = any(value.alias_info is not None and value.alias_info.is_write for value in func._schema.arguments)
        if writes or not aliases:
            outputs = [] if writes else [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.operations.append(lambda: _repeat(func, args, kwargs, outputs))
        return result


def _indexes_by_mask(name: str, args: Any) -> bool:
    is_index = name.startswith(("index.", "index_put")) or name == "index"
    return is_index and any(index is not None and index.dtype == torch.bool for index in args[1])


def _repeat(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
    results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for output, result in zip(outputs, results, strict=False):
        output.copy_(result)
