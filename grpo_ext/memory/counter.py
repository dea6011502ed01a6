"""Peak memory of a computation, counted while it runs on tensors without data (the meta device).

    with MemoryCounter() as counter:
        model(...).backward()
    counter.peak        # bytes, excluding tensors that existed before

A storage counts from the operation that creates it until the last reference is gone, so tensors that autograd saves for
the backward are included, as in a real run. Not counted: the workspace inside an operation (except dequantised weights)
and memory that the allocator keeps reserved.
"""

import functools
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class MemoryCounter(TorchDispatchMode):
    """Counts the live bytes of storages created inside its context.

    Meta tensors have no values. If the shape of an output depends on the values of a mask, the operation runs as if the
    mask were true everywhere. Small index tensors with values may be mixed with meta tensors.

    Attributes:
        live, peak: current and largest number of live bytes.
        live_at: live bytes at each call of `record`, by event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.live_at: dict[Any, int] = {}
        self._storages: dict[int, weakref.ref] = {}

    def __enter__(self) -> "MemoryCounter":
        super().__enter__()
        return self

    def record(self, event: Hashable) -> None:
        """Record the live bytes at this event, or their maximum if it happens more than once."""
        self.live_at[event] = max(self.live_at.get(event, 0), self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        if len({tensor.is_meta for tensor in inputs}) > 1:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            inputs = list(_tensors((args, kwargs)))
        output = _run(func, args, kwargs, inputs)
        input_keys = {_key(tensor) for tensor in inputs}
        for tensor in _tensors(output):
            if _key(tensor) not in input_keys:
                self._count(tensor)
        self.peak = max(self.peak, self.live + _workspace(func, args))
        return output

    def _count(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._storages:
            return
        size = storage.nbytes()
        self.live += size

        def on_free(_: weakref.ref) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, on_free)


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


# Size, stride and dtype of the output of an operation on meta tensors, by operation and arguments. The layers of a
# model repeat a few calls. Most kernels of the meta device are in Python and would take most of the time of a plan.
_outputs: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
MAX_OUTPUTS = 2**16


def _run(func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
    """Run the operation. On meta tensors, create the output directly if the same call has been run before."""
    if not (inputs and inputs[0].is_meta) or _aliases(func):
        return _run_with_full_masks(func, args, kwargs)
    call = func, _described(args), _described(kwargs)
    if call in _outputs:
        size, stride, dtype = _outputs[call]
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    output = _run_with_full_masks(func, args, kwargs)
    if isinstance(output, Tensor) and output.is_meta and _key(output) not in map(_key, inputs):
        size, stride, dtype = output.shape, output.stride(), output.dtype
        again = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        if again.untyped_storage().nbytes() == output.untyped_storage().nbytes():
            if len(_outputs) >= MAX_OUTPUTS:
                _outputs.clear()
            _outputs[call] = size, stride, dtype
    return output


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether the operation writes to an argument or returns a view of it."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def _described(value: Any) -> Hashable:
    """What the output of an operation on meta tensors depends on. Types are included, since 1 == 1.0 == True."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return type(value), *map(_described, value)
    if isinstance(value, dict):
        return tuple((name, _described(part)) for name, part in value.items())
    return type(value), value


def _run_with_full_masks(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operation. On meta tensors, one that reads the values of a mask treats it as true everywhere."""
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


def _workspace(func: Any, args: Any) -> int:
    """Bytes that an operation allocates and frees itself, here the 4-bit weights dequantised for a product."""
    if getattr(func, "namespace", "") == "bitsandbytes" and func.__name__.startswith("gemm_4bit"):
        rows, columns = args[2]
        return rows * columns * args[0].element_size()
    return 0
