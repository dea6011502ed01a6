"""Autocast for code that runs more than once, such as a backward that runs the model again or a step in a CUDA graph,
and for LoRA layers, which would cast their inputs twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


def same_autocast_without_cache(device_type: str) -> torch.autocast:
    """A context with the present autocast of this kind of device, but without its cache of casts, which would outlive
    the graph that they belong to."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


@contextmanager
def without_adapter_casts(model: nn.Module) -> Iterator[None]:
    """A context in which LoRA layers do not cast their inputs if autocast does.

    PEFT casts a 16-bit input to the adapter's float32, and autocast casts it back for the product. Without PEFT's cast,
    outputs and gradients have the same bits, and two copies of the input per layer are saved.
    """
    is_on = torch.is_autocast_enabled(next(model.parameters()).device.type)
    layers: list[Any] = [layer for layer in model.modules() if _casts_in_vain(layer)] if is_on else []
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def _casts_in_vain(layer: Any) -> bool:
    """Whether this is a plain LoRA layer, in which the adapter's product is the first to read the input. Layers on a
    quantised base never cast under autocast."""
    is_plain = type(layer) is Linear and layer.cast_input_dtype_enabled and not layer.lora_variant
    return is_plain and not any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values())
