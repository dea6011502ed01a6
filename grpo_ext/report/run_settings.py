"""`run.json`: what a run was started with, written before its first step, so that a run that dies has it too.

    {"command": "accelerate launch recipes/math.py --seed 1", "settings": {"learning_rate": 0.001, ...},
     "changed": ["learning_rate", ...], "adapter": {"r": 16, ...}, "versions": {"trl": "1.16.0", ...}, ...}

It is made to be shown to others: tokens, passwords and the like are left out, and local paths are shortened.
"""

import dataclasses
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.machine import device_name
from grpo_ext.model.adapters import count_parameters
from grpo_ext.report.summary import PACKAGES

SETTINGS_FILE = "run.json"
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora")
RESOLVED = ("accelerator_config",)  # fields that transformers replaces by an object of its own
HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|password|passwd|secret|key|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)\w{8,}|(?<=://)[^/@\s]+(?=@)")


class SettingsFile(TrainerCallback):
    """Writes `output_dir/run.json` at the start of training."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write it, on the main process."""
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        model = kwargs["model"]
        settings = {name: shown(value, name) for name, value in args.to_dict().items() if not _SECRET_NAME.search(name)}
        trainable, total = count_parameters(model)
        run = {
            "command": command_line(),
            "base_model": shown(model.config.name_or_path),
            "device": device_name(args.device),
            "processes": args.world_size,
            "steps": state.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "settings": settings,
            "changed": _changed(args, settings),
            "adapter": _adapter(model),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        }
        path = Path(args.output_dir, SETTINGS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=2) + "\n")


def shown(value: Any, name: str = "") -> Any:
    """A setting as it may be shown: plain data, without secrets, local paths shortened."""
    if _SECRET_NAME.search(name) and value is not None:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): shown(item, str(key)) for key, item in value.items()}
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, set):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shown(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = _SECRET_VALUE.sub(HIDDEN, str(value))
    return _short_path(text) if text.startswith("/") else text


def command_line() -> str:
    """What to type in the folder of the run to have it again."""
    hidden = False
    words = []
    for word in [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]:
        flag, equals, value = word.partition("=")
        words.append(HIDDEN if hidden else f"{flag}={shown(value, flag)}" if equals else str(shown(word)))
        hidden = bool(not equals and word.startswith("-") and _SECRET_NAME.search(word))
    launcher = "python"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # `accelerate launch` sets it
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{launcher} {shlex.join(words)}"


def _short_path(path: str) -> str:
    """Relative to the current folder where it lies below it, or to home; else no more than its last part."""
    for folder, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder):
            return f"{sign}{Path(path).relative_to(folder)}"
    return f".../{Path(path).name}"


def _changed(args: TrainingArguments, settings: dict[str, Any]) -> list[str]:
    """Those of the settings that are not at their defaults; an empty one is as good as none."""
    changed = []
    for field in dataclasses.fields(args):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(args, field.name)
        is_empty = value in (None, "", [], {}) and default in (None, "", [], {})
        if field.name in settings and value != default and not is_empty and field.name not in RESOLVED:
            changed.append(field.name)
    return changed


def _adapter(model: Any) -> dict[str, Any]:
    """The settings of the adapter that is trained; empty for a model without one."""
    config = getattr(model, "peft_config", {}).get("default")
    settings = {} if config is None else config.to_dict()
    return {name: shown(settings[name]) for name in ADAPTER_SETTINGS if settings.get(name) is not None}
