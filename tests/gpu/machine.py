"""What this machine has: the card, its driver, versions of packages, and which packages are missing."""

import datetime
import importlib.util
import platform
import shutil
from typing import Any

from children import GIB
from report import installed_version, machine

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"),
    *("huggingface_hub", "pyarrow", "pandas", "fsspec", "safetensors", "loky", "cloudpickle", "math_verify"),
    *("latex2sympy2_extended", "sympy", "mpmath", "scipy", "matplotlib", "bokeh", "jinja2", "psutil", "rich"),
)


def describe() -> dict[str, Any]:
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": _gpu(torch) if has_gpu else "no GPU that this torch can use",
        "torch_cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
        "missing": [name for name in PACKAGES if importlib.util.find_spec(name) is None],
        "c_compiler": shutil.which("cc") or shutil.which("gcc"),  # Triton needs one
        "host": machine(torch.get_num_threads()),
    }


def _gpu(torch: Any) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()  # after the context was made
    return {
        "name": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "total_gib": round(total / GIB, 2),
        "free_gib": round(free / GIB, 2),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }
