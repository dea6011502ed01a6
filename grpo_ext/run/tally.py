"""What the tensors of a computation hold at most, counted while it runs on tensors without data (the meta device).

    with Tally() as tally:
        model(...).backward()
    tally.peak        # bytes, beside what was there before

Storages are counted from the operation that makes them until nothing holds them any more: what autograd keeps for the
backward is among them, as it is in the run itself. Not counted: what an operation takes and gives back inside itself,
but for dequantised weights; and whatever the allocator keeps.
"""

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten


class Tally(TorchDispatchMode):
    """Counts live bytes inside its context.

    Operations whose result depends on values, which meta tensors do not have, get the result of a mask that is true
    everywhere. Tensors that do have values, small ones of indices, may stand beside meta tensors.

    Attributes:
        now, peak: bytes, of storages that were made in the context.
        marked: `now` at the moments that `mark` was called at, by their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.marked: dict[Any, int] = {}
        self._storages: dict[int, weakref.ref] = {}

    def __enter__(self) -> "Tally":
        super().__enter__()
        return self

    def mark(self, moment: Hashable) -> None:
        """Remember what is there now, under a name; of several times, the most."""
        self.marked[moment] = max(self.marked.get(moment, 0), self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _all_on_meta(args, kwargs or {})
        given = {_key(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        output = _with_true_masks(func, args, kwargs)
        for value in tree_flatten(output)[0]:
            if isinstance(value, Tensor) and _key(value) not in given:
                self._count(value)
        inside = _inside(func, args)
        self.peak = max(self.peak, self.now + inside)
        return output

    def _count(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._storages:
            return
        size = storage.nbytes()
        self.now += size

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _all_on_meta(args: Any, kwargs: Any) -> tuple[Any, Any]:
    values, form = tree_flatten((args, kwargs))
    on_meta = {value.is_meta for value in values if isinstance(value, Tensor)}
    if on_meta != {True, False}:
        return args, kwargs
    return tree_unflatten([value.to("meta") if isinstance(value, Tensor) else value for value in values], form)


def _with_true_masks(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation itself, but for those that read values of a mask."""
    first = args[0] if args else None
    if not (isinstance(first, Tensor) and first.is_meta):
        return func(*args, **kwargs)
    if func is aten.nonzero.default:
        return first.new_empty((first.numel(), first.ndim), dtype=torch.long)
    if func is aten.masked_select.default:
        return first.new_empty((args[1].numel(),))
    if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
        mask = args[1][0]
        return first.new_empty((mask.numel(), *first.shape[mask.ndim :]))
    return func(*args, **kwargs)


def _inside(func: Any, args: Any) -> int:
    """Bytes that an operation takes for itself: 4-bit weights, which are unpacked to multiply."""
    if getattr(func, "namespace", "") == "bitsandbytes" and func.__name__.startswith("gemm_4bit"):
        rows, columns = args[2]
        return rows * columns * args[0].element_size()
    return 0
