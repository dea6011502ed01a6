"""Autocast for code that runs more than once: a backward that runs the model again, or a step in a CUDA graph."""

import torch


def same_autocast_without_cache(device_type: str) -> torch.autocast:
    """A context with the present autocast of this kind of device, but without its cache of casts, which would outlive
    the graph that they belong to."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
