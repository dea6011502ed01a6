"""The machine under a run: its name and its memory."""

import platform
import resource
import sys

import psutil
import torch

GIB = 2**30


def device_name(device: torch.device) -> str:
    """`NVIDIA GeForce RTX 4070`, or `CPU, 2 threads (x86_64)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads ({platform.machine()})"


def memory_in_use(device: torch.device) -> str:
    """What the process holds now: memory of the GPU, of its size, or resident memory on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.memory_allocated(device) / GIB:.2f} of {total / GIB:.0f} GB on the GPU"
    return f"{psutil.Process().memory_info().rss / GIB:.2f} GB resident"


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB (10^6 bytes): allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB
