"""A second device on a CPU: `simulated:0`, with the rules of a GPU, which counts host syncs and kernel launches.

    with SecondDevice() as device:
        lm.to(device.torch_device)
        lm.generate(ids.to(device.torch_device))
        print(device.counts.report())

Inside the `with`, a trainer with `use_cpu=False` is on this device, and so are its optimizer and its checkpoints.
`SecondDevice(has_float64=False)` refuses float64, as Apple's GPUs do.

A tensor of this device wraps a CPU tensor, so all values are real. An operation that mixes devices raises an error if
it would raise one on CUDA. Autocast to bfloat16 and float16 casts what it casts on CUDA. Random numbers come from the
random state of the CPU, so a program draws the same on either device.

A host sync is an operation for which the program waits until the device has finished all work: reading a value, a
result whose shape depends on values (boolean masks, `nonzero`), and a copy from or to pageable memory. Every other
operation except views and allocations is one kernel launch. There are no fused kernels: attention is several launches.

Torch cannot unregister a backend. After the `with`, the device is reported as unavailable, and nothing can be put on
it; only `torch.accelerator.current_accelerator()` without its check still names it.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import grpo_ext

NAME = "simulated"
TORCH_DEVICE = torch.device("privateuseone", 0)  # its name is NAME once the backend is registered

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
WITHOUT_KERNEL = {*ALLOCATIONS, aten._unsafe_view.default, aten._local_scalar_dense.default}
# The host waits for these: a value is read, or the shape of the result depends on values.
SYNCS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
INDEXING = {
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}
# In addition to pointwise operations, these accept a scalar tensor that is on the CPU.
TAKE_HOST_SCALARS = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
HALVES = (torch.float16, torch.bfloat16)
# What autocast casts on CUDA, among the operations of language models.
IN_LOW_PRECISION = (
    "linear matmul mm bmm mv addmm addmv addbmm baddbmm conv1d conv2d scaled_dot_product_attention".split()
)
IN_FLOAT32 = (
    "exp expm1 log log10 log1p log2 reciprocal rsqrt pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus "
    "layer_norm norm.Scalar softmax.int log_softmax.int logsumexp sum sum.dim_IntList cumsum prod"
).split()


class Event(NamedTuple):
    """What was counted.

    Attributes:
        operation: name of the operation, such as `aten::item`.
        line: the innermost line of grpo_ext that led to it, such as `engine/decode.py:133`.
        inner: the innermost line outside torch, such as `transformers/masking_utils.py:300`; usually the same.
    """

    operation: str
    line: str
    inner: str

    def __str__(self) -> str:
        return f"{self.operation} at {self.line}" + ("" if self.inner == self.line else f" ({self.inner})")


@dataclass
class Counts:
    """Host syncs, kernel launches, and operations that mixed devices and raised an error for it."""

    syncs: Counter[Event] = field(default_factory=Counter)
    launches: Counter[Event] = field(default_factory=Counter)
    mixed: Counter[Event] = field(default_factory=Counter)

    def report(self) -> str:
        """Every host sync by line, most frequent first, and the number of launches by line of grpo_ext."""
        launches: Counter[str] = Counter()
        for event, count in self.launches.items():
            launches[event.line] += count
        syncs = [f"{count:6} {event}" for event, count in self.syncs.most_common()]
        return "\n".join(["host syncs", *syncs, "launches", *(f"{n:6} {line}" for line, n in launches.most_common())])


class SecondDevice:
    """The device. It exists inside the `with`, and one at a time.

    Attributes:
        torch_device: its name for torch.
        has_float64: False if a tensor in float64 raises an error.
        counts: what was counted since the `with`, or since the last `counting`.
    """

    torch_device = TORCH_DEVICE
    active: ClassVar["SecondDevice | None"] = None

    def __init__(self, *, has_float64: bool = True) -> None:
        self.has_float64 = has_float64
        self.counts = Counts()
        self.pinned: dict[int, Tensor] = {}  # by address; kept alive so that no address is used twice
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # autocast's cache: by id, a leaf and its cast
        self._stack = ExitStack()

    def __enter__(self) -> "SecondDevice":
        assert SecondDevice.active is None, "another second device exists"
        _register_backend()
        enter = self._stack.enter_context
        enter(patch.object(SecondDevice, "active", self))
        enter(patch.object(torch, "clear_autocast_cache", self._clear_casts))
        enter(_kernels())
        # Autograd starts one thread per device that existed at its first backward. Without threads, it can be used on
        # this device at any time, and the lines that called it are known.
        enter(torch.autograd.set_multithreading_enabled(False))
        enter(patch.object(torch.accelerator, "synchronize", _synchronize))
        for name, value in TRAINERS.items():
            enter(patch(name, value))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """A context with counts of its own, which start at 0."""
        outer, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = outer

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Autocast's cast to `dtype`. Trainable parameters are cast once per `torch.autocast`."""
        is_cached = tensor.requires_grad and tensor.is_leaf and torch.is_autocast_cache_enabled()
        if not is_cached:
            return tensor.to(dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor, tensor.to(dtype)
        return self.casts[id(tensor)][1]

    def _clear_casts(self, clear: Callable[[], None] = torch.clear_autocast_cache) -> None:
        self.casts.clear()
        clear()


class SimulatedTensor(torch.Tensor):
    """A tensor of the device; its values are in `host`, a CPU tensor."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "SimulatedTensor":
        if host.dtype == torch.float64 and SecondDevice.active is not None and not SecondDevice.active.has_float64:
            raise TypeError(f"{TORCH_DEVICE} does not support float64. Use float32 instead.")
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=TORCH_DEVICE,
        )
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, *args, **kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "SimulatedTensor") -> None:
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the CPU tensor: safetensors reads addresses and sizes before it copies the values."""
        return self.host.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a CPU tensor, which a checkpoint moves to the device after it is loaded."""
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if _is_parameter(self) else copy
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.host})"


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


# Operations


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one operation on the CPU tensors inside its arguments, count it, and wrap its results."""
    device = SecondDevice.active or SecondDevice()  # a tensor may be printed after the `with`
    tensors = list(_tensors((args, *kwargs.values())))
    if func in (aten._to_copy.default, aten.copy_.default):
        return _copy(device, func, args, kwargs)
    _check_placement(device, func, args, tensors)
    if reason := _why_sync(func, args, kwargs):
        device.counts.syncs[_event(reason)] += 1
    results = func(*_to_host(args), **{name: _to_host(value) for name, value in kwargs.items()})
    own = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)}
    wrapped = _wrap(results, own)
    if _launches(func, [*_tensors((wrapped,)), *tensors]):
        device.counts.launches[_event(_name(func))] += 1
    return wrapped


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among these values and in lists and tuples of them. torch's own pytrees take most of the time of an
    operation on small tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


_name = functools.cache(str)  # of an operation


def _copy(device: SecondDevice, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """`copy_(target, source)`, or `_to_copy(source, device=..., dtype=...)`."""
    if func is aten.copy_.default:
        target, source = args[:2]
        ends = target, source
        is_async = kwargs.get("non_blocking", args[2] if len(args) > 2 else False) and _is_pinned(device, ends)
    else:
        source, target_device = args[0], kwargs.get("device")
        is_on_device = isinstance(source, SimulatedTensor) if target_device is None else target_device.type == NAME
        target, ends = None, (source,)
        is_async = kwargs.get("non_blocking")  # copied into pinned memory if it goes to the host
    result = func(*_to_host(args), **{name: _to_host(value) for name, value in kwargs.items()})
    if target is None:
        target = SimulatedTensor(result) if is_on_device else result
    direction = {(False, True): "copy to the device", (True, False): "copy to the host"}.get(
        (isinstance(source, SimulatedTensor), isinstance(target, SimulatedTensor))
    )
    if target.numel() == 0:  # nothing to copy
        return target
    if direction and not is_async:
        device.counts.syncs[_event(direction)] += 1
    else:
        device.counts.launches[_event(_name(func))] += 1
    return target


def _is_pinned(device: SecondDevice, tensors: tuple[Tensor, ...]) -> bool:
    hosts = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    return all(tensor.untyped_storage().data_ptr() in device.pinned for tensor in hosts)


def _to_host(value: Any) -> Any:
    """A value with CPU tensors in place of those of the device."""
    if isinstance(value, SimulatedTensor):
        return value.host
    if isinstance(value, list | tuple):
        return list(map(_to_host, value)) if isinstance(value, list) else tuple(map(_to_host, value))
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _wrap(result: Any, own: dict[int, SimulatedTensor]) -> Any:
    """Results with tensors of the device; an argument that was written in place is returned itself."""
    if isinstance(result, Tensor):
        return own[id(result)] if id(result) in own else SimulatedTensor(result)
    if isinstance(result, list | tuple):
        wrapped = [_wrap(part, own) for part in result]
        return wrapped if isinstance(result, list) else tuple(wrapped)
    return result


def _launches(func: Any, values: list[Any]) -> bool:
    if func.is_view or func in WITHOUT_KERNEL:
        return False
    return any(isinstance(value, SimulatedTensor) and value.host.numel() > 0 for value in values)


def _check_placement(device: SecondDevice, func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Raise the error that CUDA would raise if some tensors are on the device and others are not."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    if len(strangers) in (0, len(tensors)):
        return
    is_first_own = isinstance(args[0], SimulatedTensor)
    if func in INDEXING and is_first_own:  # indices on the CPU are copied to the device
        device.counts.syncs[_event("copy of indices to the device")] += 1
        return
    takes_scalars = torch.Tag.pointwise in func.tags or func in TAKE_HOST_SCALARS
    if takes_scalars and all(tensor.dim() == 0 for tensor in strangers) and not _writes_to(func, args, strangers):
        return
    device.counts.mixed[_event(str(func))] += 1
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but {func} got tensors on {TORCH_DEVICE}, and on the CPU "
        f"those of shape {[tuple(tensor.shape) for tensor in strangers]}"
    )


def _writes_to(func: Any, args: tuple, tensors: list[Tensor]) -> bool:
    return func._schema.is_mutable and any(args[0] is tensor for tensor in tensors)


def _why_sync(func: Any, args: tuple, kwargs: dict) -> str | None:
    """What the host waits for, or None."""
    if func in SYNCS:
        return str(func)
    if func in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        return "boolean mask as an index"
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    return None


# Lines of the program

PACKAGE = f"{Path(grpo_ext.__file__).parent}/"
TORCH = f"{Path(torch.__file__).parent}/"
PACKAGES = f"{Path(torch.__file__).parents[1]}/"


def _event(operation: str) -> Event:
    """An event at the lines that are running."""
    inner, frame = "", sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not inner and file != __file__ and not file.startswith(TORCH):
            inner = _line(file, frame.f_lineno)
        if file.startswith(PACKAGE):
            return Event(operation, _line(file, frame.f_lineno), inner)
        frame = frame.f_back
    return Event(operation, inner, inner)


@functools.cache
def _line(file: str, number: int) -> str:
    for folder in (PACKAGE, PACKAGES):
        file = file.removeprefix(folder)
    return f"{file}:{number}"


# What torch has to know


@contextmanager
def _kernels() -> Iterator[None]:
    """Every operation on the device, and what autocast does on it."""
    everywhere, in_aten = Library("_", "IMPL"), Library("aten", "IMPL")
    everywhere.fallback(_run, "PrivateUse1")
    everywhere.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in IN_LOW_PRECISION + IN_FLOAT32:
        operation, _, overload = name.partition(".")
        func = getattr(getattr(aten, operation), overload or "default")
        kernel = functools.partial(_autocast, func, name in IN_FLOAT32)
        in_aten.impl(name, kernel, "AutocastPrivateUse1")
    # `torch.tensor(values, device=...)` bypasses `__torch_dispatch__`, and a fallback takes no tensors of a subclass.
    in_aten.impl("copy_", functools.partial(_run, aten.copy_.default), "PrivateUse1")
    in_aten.impl("_pin_memory", _pin, "CPU")
    try:
        yield
    finally:
        in_aten._destroy()
        everywhere._destroy()


def _pin(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    copy = tensor.clone()
    assert SecondDevice.active is not None
    SecondDevice.active.pinned[copy.untyped_storage().data_ptr()] = copy
    return copy


def _autocast(func: Any, in_float32: bool, *args: Any, **kwargs: Any) -> Any:
    """Run an operation with its low-precision inputs in float32, or all its inputs in the precision of autocast."""
    dtype = torch.float32 if in_float32 else torch.get_autocast_dtype(NAME)
    accepted = HALVES if in_float32 else (torch.float32, *HALVES)

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, SimulatedTensor) and value.dtype in accepted and value.dtype != dtype
        return SecondDevice.active.cast(value, dtype) if is_cast else value

    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(autocast):
        return func(*tree_map(cast, args), **tree_map(cast, kwargs))


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return SecondDevice.active is not None

    def has_primary_context(self, device_index: int) -> bool:
        return SecondDevice.active is not None

    def is_built(self) -> bool:
        return SecondDevice.active is not None


class _Module:
    """`torch.simulated`, the counterpart of `torch.cuda`."""

    def is_available(self) -> bool:
        return SecondDevice.active is not None

    def is_initialized(self) -> bool:
        return SecondDevice.active is not None

    def device_count(self) -> int:
        return int(self.is_available())

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """`torch.manual_seed` has already seeded the CPU, whose random state this device uses."""

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return list(HALVES)

    def synchronize(self, device: Any = None) -> None:
        _synchronize()


def _synchronize(device: Any = None) -> None:
    if SecondDevice.active is not None:
        SecondDevice.active.counts.syncs[_event("synchronize")] += 1


# What accelerate and transformers, which know the devices by name, have to be told about this one.
TRAINERS: dict[str, Any] = {
    "accelerate.state.PartialState.default_device": TORCH_DEVICE,
    "transformers.TrainingArguments.device": property(
        lambda args: args._setup_devices and args.distributed_state.device
    ),
    "transformers.training_args.is_torch_bf16_gpu_available": lambda: True,
}


@functools.cache
def _register_backend() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
