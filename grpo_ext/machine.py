"""The machine that a run uses: device name, memory, and installed versions.

torch and psutil are imported on first use, so that `grpo-ext doctor` can report that they are missing.
"""

import functools
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one is the older name
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def device_name(device: "torch.device") -> str:
    """`NVIDIA GeForce RTX 4070`, or `CPU, 2 threads (x86_64)`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads ({platform.machine()})"


def supports_bfloat16() -> bool:
    """Whether the accelerator computes in bfloat16. By default, torch counts NVIDIA cards before Ampere, which only
    store it: their matrix units compute in float16."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def memory_in_use(device: "torch.device") -> str:
    """Memory that this process uses: allocated on the GPU, with the size of the card, or resident on a CPU."""
    import psutil
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.memory_allocated(device) / GIB:.2f} of {total / GIB:.0f} GB on the GPU"
    return f"{psutil.Process().memory_info().rss / GIB:.2f} GB resident"


def use_expandable_segments() -> None:
    """Let PyTorch's allocator on a GPU grow its segments, unless the user has configured it. Caches of completions grow
    as they are sampled, and blocks of fixed sizes would fragment the memory. Must be called before CUDA starts."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def peak_memory_mb(device: "torch.device") -> float:
    """Peak memory of this process, in MB (10^6 bytes): allocated on the GPU, or resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def free_memory_per_process(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of RAM that this process can still take: what is available on this machine, or left in its container, in
    equal parts for the processes of a run.

    Args:
        cgroup: folder in which Linux describes the control group (version 2) of a container.
    """
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        # The kernel gives up cached files that nobody has used recently.
        free = min(free, int(limit) - int(used) + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no control group, or no limit: "max"
        pass
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@functools.cache  # reads a file of each package
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that determine what a run computes: {"torch": "2.8.0", ...}."""
    return {package: version(package) for package in PACKAGES}
