"""`grpo-ext doctor`: what a run needs on this machine, what is missing, and what to type.

A red line means that no run works. A yellow line means that some runs do not start, or are slower.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show
from grpo_ext.machine import GIB, device_name, supports_bfloat16

SHOWN_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
LOW_DISK_GB, MIN_DISK_GB = 10, 1  # free: a small model with a few checkpoints needs the first, any run the second
HUB_TIMEOUT_S = 3
MARKS = {"green": "ok", "yellow": "look", "red": "stop"}


@dataclass(frozen=True)
class Finding:
    """One line of the table: green if all is well, else with a remedy: what to type."""

    name: str
    colour: Literal["green", "yellow", "red"]
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(options: argparse.Namespace) -> None:
    """Print one line per finding; exit with 1 if one is red."""
    with suppress(ImportError):  # a missing package is a finding
        quiet_libraries()
    findings = list(examine())
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", "bold")
        table.add_row(Text(MARKS[finding.colour], finding.colour), finding.name, text)
    show(table)
    if any(finding.colour == "red" for finding in findings):
        sys.exit("No run works until the red lines are fixed: do what they say, then run grpo-ext doctor again.")


def examine() -> Iterator[Finding]:
    """Examine the machine; yields the lines of the table in order. A package that is missing or broken spoils only the
    lines that need it."""
    checks = {
        "Python": python,
        "packages": packages,
        "device": device,
        "precision": precision,
        "4-bit bases": four_bits,
        "sandbox": sandbox,
        "reward workers": reward_workers,
        "disk, current folder": current_folder,
        "disk, Hub cache": hub_cache,
        "Hub": hub,
    }
    for name, check in checks.items():
        try:
            yield check()
        except (ImportError, OSError) as error:
            yield Finding(name, "red", f"not examined: {error}", "install what the line about packages names")


def python() -> Finding:
    """The version of Python, compared with the one that the package requires."""
    here = platform.python_version()
    try:
        wanted = metadata("grpo-ext")["Requires-Python"]
    except PackageNotFoundError:
        return Finding("Python", "yellow", f"{here}; grpo-ext itself is not installed", "pip install -e .")
    if SpecifierSet(wanted).contains(here):
        return Finding("Python", "green", here)
    return Finding("Python", "red", f"{here}, and grpo-ext needs {wanted}", "make PYTHON=python3.11")


def packages() -> Finding:
    """Installed packages, compared with the version ranges that the package requires and is tested with."""
    try:
        needed = [Requirement(line) for line in requires("grpo-ext") or []]
    except PackageNotFoundError:
        return Finding("packages", "yellow", "grpo-ext itself is not installed", "pip install -e .")
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    installed = [(one, _version(one.name)) for one in needed]
    wrong = [(one, here) for one, here in installed if not (here and one.specifier.contains(here, prereleases=True))]
    if wrong:
        text = ", ".join(f"{one.name} {found or 'missing'} (needs {one.specifier})" for one, found in wrong)
        return Finding(
            "packages", "red", text, "pip install " + " ".join(f'"{one.name}{one.specifier}"' for one, _ in wrong)
        )
    shown = ", ".join(f"{name} {_version(name)}" for name in SHOWN_PACKAGES)
    return Finding("packages", "green", f"all {len(needed)} are in the tested ranges: {shown}")


def _version(name: str) -> str:
    """The installed version; "" for a missing package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def device() -> Finding:
    """The GPU, or the CPU's memory."""
    import psutil
    import torch

    if not torch.accelerator.is_available():
        memory = psutil.virtual_memory()
        free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GB free"
        text = f"no GPU; {device_name(torch.device('cpu'))}, {free}"
        return Finding("device", "yellow", text, "nvidia-smi; if it shows a card, install PyTorch with CUDA")
    here = torch.accelerator.current_accelerator()
    assert here is not None
    text = device_name(here)
    if here.type == "cuda":
        there, total = torch.cuda.mem_get_info()
        text = f"{torch.cuda.device_count()} x {text}, {there / GIB:.1f} of {total / GIB:.1f} GB free"
    return Finding("device", "green", text)


def precision() -> Finding:
    """The precision that a run computes in."""
    import torch

    if not torch.accelerator.is_available():
        return Finding("precision", "green", "float32, as on every CPU")
    if supports_bfloat16():
        return Finding("precision", "green", "bfloat16")
    return Finding(
        "precision", "yellow", "no bfloat16 on this card: runs use float16", "nothing to do: it is chosen automatically"
    )


def four_bits() -> Finding:
    """Whether a 4-bit layer runs forward here."""
    import torch

    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(here)
        with torch.no_grad():
            works = bool(layer(torch.ones(1, 64, device=here)).isfinite().all())
        why = "its output is not finite"
    except (RuntimeError, OSError, ImportError, NotImplementedError, AttributeError) as error:
        works, why = False, str(error).partition("\n")[0]
    if works:
        return Finding("4-bit bases", "green", "a layer of bitsandbytes runs forward")
    return Finding("4-bit bases", "yellow", f"--load_in_4bit does not work: {why}", "pip install -U bitsandbytes")


def sandbox() -> Finding:
    """Whether model-written programs can be run, as code rewards require."""
    from grpo_ext.rewards.code.sandbox import run_program

    try:
        outcome = run_program("print(6 * 7)")
    except (RuntimeError, OSError) as error:
        why = str(error).partition("\n")[0]
        remedy = "check whether this container or kernel allows user namespaces"
        for package in ("bubblewrap", "libseccomp2"):
            if f"install {package}" in why:
                why, remedy = f"{package} is not installed", f"apt install {package}"
        return Finding("sandbox", "yellow", f"rewards that run programs do not work; others do: {why}", remedy)
    if outcome.stdout != b"42\n":
        text = f"a test program ended with status {outcome.status!r}"
        return Finding("sandbox", "yellow", text, "python -c 'print(6 * 7)'")
    return Finding("sandbox", "green", "a test program runs in it")


def reward_workers() -> Finding:
    """Whether a reward can run in a worker process, and how to request that."""
    from grpo_ext.rewards import isolated, length_reward

    reward = isolated(length_reward, workers=1, on_error="raise", timeout_s=60.0)
    try:
        reward(completions=["a word"])
    except (RuntimeError, OSError) as error:
        why = str(error).partition("\n")[0]
        remedy = "--reward_workers 0: every reward in the training process"
        return Finding("reward workers", "yellow", f"a worker process does not start: {why}", remedy)
    finally:
        reward.close()
    text = (
        "they start; for a reward that may hang: reward_funcs=isolated(REWARD), from grpo_ext.rewards import isolated"
    )
    return Finding("reward workers", "green", text)


def current_folder() -> Finding:
    """The disk that the output of a run goes to by default."""
    return disk("disk, current folder", Path.cwd(), "output_dir=FOLDER on a larger disk")


def hub_cache() -> Finding:
    """The disk that models are downloaded to."""
    from huggingface_hub import constants

    remedy = "hf cache prune, or export HF_HOME=FOLDER on a larger disk"
    return disk("disk, Hub cache", Path(constants.HF_HUB_CACHE), remedy)


def disk(name: str, folder: Path, remedy: str) -> Finding:
    """Whether this folder, which does not need to exist yet, can be written to, and the free space on its disk."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    text = f"{free:.1f} GB free in {folder}"
    if not os.access(there, os.W_OK):
        return Finding(name, "red", f"{folder} cannot be written to", remedy)
    if free < LOW_DISK_GB:
        return Finding(name, "red" if free < MIN_DISK_GB else "yellow", text, remedy)
    return Finding(name, "green", text)


def hub() -> Finding:
    """Whether the Hub responds and accepts the saved token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.is_offline_mode():
        text = "offline, because HF_HUB_OFFLINE is set: only files on disk can be used"
        return Finding("Hub", "yellow", text, "unset HF_HUB_OFFLINE")
    token = get_token()
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(token=token or False), timeout=HUB_TIMEOUT_S
        )
    except Exception as error:  # the type depends on the HTTP client of this version of huggingface_hub
        text = f"{constants.ENDPOINT} does not respond ({type(error).__name__}): only files on disk can be used"
        return Finding("Hub", "yellow", text, "check the network; export HF_HUB_OFFLINE=1 avoids the wait")
    if answer.status_code == 200:
        return Finding("Hub", "green", f"logged in as {answer.json()['name']}")
    if token is None:
        return Finding("Hub", "yellow", "it responds; not logged in, so no gated models and no push", "hf auth login")
    return Finding("Hub", "yellow", f"it responds, but rejects the saved token ({answer.status_code})", "hf auth login")
