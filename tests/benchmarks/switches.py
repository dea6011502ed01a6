"""Switch off single mechanisms of grpo_ext that have no option, to measure what each of them gains.

switch_off(["CUDA graph"])      # in a process that measures one variant
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from grpo_ext.engine import decode, decode_cache, prefill, score


def _without_cuda_graph() -> None:
    _replace(decode, "CapturedSteps", lambda capture: None)


def _without_stacked_lora() -> None:
    _replace(decode, "stacked_lora", lambda model: nullcontext())


def _without_grouped_attention() -> None:
    for module in (decode_cache, prefill, score):
        _replace(module, "grouped_attention", nullcontext)


def _replace(module: ModuleType, name: str, replacement: Any) -> None:
    getattr(module, name)  # raises if the mechanism was renamed, and would stay on
    setattr(module, name, replacement)


OFF: dict[str, Callable[[], None]] = {
    "CUDA graph": _without_cuda_graph,
    "stacked LoRA": _without_stacked_lora,
    "grouped attention": _without_grouped_attention,
}


def switch_off(names: Iterable[str]) -> None:
    """Switch these off, for the rest of the process."""
    for name in names:
        OFF[name]()
