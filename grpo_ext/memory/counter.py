"""What the tensors of a computation hold at most, counted while it runs on tensors without data (the meta device).

    with Tally() as tally:
        model(...).backward()
    tally.peak        # bytes, beside what was there before

Storages are counted from the operation that makes them until nothing holds them any more: what autograd keeps for the
backward is among them, as it is in the run itself. Not counted: what an operation takes and gives back inside itself,
but for dequantised weights; and whatever the allocator keeps.
"""

import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if len({tensor.is_meta for tensor in given}) > 1:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            given = list(_tensors((args, kwargs)))
        output = _with_true_masks(func, args, kwargs)
        keys = {_key(tensor) for tensor in given}
        for tensor in _tensors(output):
            if _key(tensor) not in keys:
                self._count(tensor)
        self.peak = max(self.peak, self.now + _inside(func, args))
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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


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
