"""Write `run.json`: how a run was started. It is written before the first step, so a run that dies has it too.

    {"command": "accelerate launch recipes/math.py --seed 1", "settings": {"learning_rate": 0.001, ...},
     "changed": ["learning_rate", ...], "adapter": {"r": 16, ...}, "versions": {"trl": "1.16.0", ...}, ...}

The file can be shown to others: secrets such as tokens and passwords are redacted, and local paths are shortened.
"""

import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_ext.config import DEFAULTS, RESOLVED_DEFAULTS
from grpo_ext.machine import device_name, package_versions
from grpo_ext.model.adapters import count_parameters
from grpo_ext.report.run_files import SETTINGS_FILE

ADAPTER_FIELDS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora")
REPLACED_FIELDS = ("accelerator_config",)  # transformers replaces their values with its own objects
REDACTED = "(hidden)"
COMMAND, RESUME = "grpo-ext", "resume_from_checkpoint"
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "accelerate.commands.launch")
PACKAGES = Path(__file__).resolve().parents[2]  # the checkout or site-packages

_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|password|passwd|secret|key|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)\w{8,}|(?<=://)[^/@\s]+(?=@)")


class SettingsFile(TrainerCallback):
    """Writes `output_dir/run.json` at the start of training.

    Args:
        accepted_changes: returns the changes of settings that the run was resumed with (`checkpoints/resume.py`).
    """

    def __init__(self, accepted_changes: Callable[[], list[dict[str, Any]]] = list):
        self._accepted_changes = accepted_changes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file, on the main process."""
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        model = kwargs["model"]
        settings = {
            name: redact(value, name) for name, value in args.to_dict().items() if not _SECRET_NAME.search(name)
        }
        trainable, total = count_parameters(model)
        run = {
            "command": command_line(),
            "base_model": redact(model.config.name_or_path),
            "device": device_name(args.device),
            "processes": args.world_size,
            "steps": state.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "settings": settings,
            "changed": _changed_settings(args, settings),
            "accepted_changes": redact(self._accepted_changes()),
            "adapter": _adapter_settings(model),
            "versions": {"python": platform.python_version(), **package_versions()},
        }
        path = Path(args.output_dir, SETTINGS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def redact(value: Any, name: str = "") -> Any:
    """A setting that can be shown to others: plain data without secrets, local paths shortened.

    Args:
        name: name of the setting; a value whose name is like `hub_token` is hidden completely.
    """
    if _SECRET_NAME.search(name) and value is not None:
        return REDACTED
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, set):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [redact(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = _SECRET_VALUE.sub(REDACTED, str(value))
    return _short_path(text) if text.startswith("/") else text


def command_line() -> str:
    """The command that repeats this run when typed in the same working folder."""
    hidden = False
    arguments = []
    for argument in sys.argv[1:]:
        flag, equals, value = argument.partition("=")
        arguments.append(REDACTED if hidden else f"{flag}={redact(value, flag)}" if equals else str(redact(argument)))
        hidden = bool(not equals and argument.startswith("-") and _SECRET_NAME.search(argument))
    program = Path(sys.argv[0])
    if program.stem == COMMAND:
        return shlex.join([COMMAND, *arguments])
    launcher = "python"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # `accelerate launch` sets it
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.origin == str(program):  # started with -m
        return f"{launcher} -m {shlex.join([module.name.removesuffix('.__main__'), *arguments])}"
    return f"{launcher} {shlex.join([str(redact(str(program.resolve()))), *arguments])}"


def resume_command(*, resumes: bool = True) -> str:
    """The command of this process, or of its launcher, that continues this run when typed in the same folder; with
    `resumes=False`, the one that started it. Secrets are hidden. The launcher must still be running."""
    command = _installed_command(_launched_command())
    if resumes:
        command = [*_without_flag(command, RESUME), f"--{RESUME}", "last"]
    return shlex.join(_without_secrets(command))


def _launched_command() -> list[str]:
    """The command that was typed, as words."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ):
        with suppress(psutil.Error):
            command = psutil.Process(os.getppid()).cmdline()
            if any(Path(part).name in LAUNCHERS for part in command[:3]):
                return command
    return sys.orig_argv


def _installed_command(command: list[str]) -> list[str]:
    """`["grpo-ext", "train"]` for `["/env/bin/python", "/env/bin/grpo-ext", "train"]`, if a shell finds the same."""
    program = Path(command[1]) if len(command) > 1 else Path()
    if program.stem not in (COMMAND, *LAUNCHERS) or program.parent != Path(sys.executable).parent:
        return command
    on_path = shutil.which(program.stem)
    return [program.stem if on_path and Path(on_path) == program else str(program), *command[2:]]


def _without_flag(command: list[str], name: str) -> list[str]:
    """The words of a command without `--name value` and `--name=value`."""
    kept, is_value = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        is_flag = flag.startswith("--") and flag[2:].replace("-", "_") == name
        if not (is_flag or is_value):
            kept.append(word)
        is_value = is_flag and not equals
    return kept


def _without_secrets(command: list[str]) -> list[str]:
    words, is_secret = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        names_secret = flag.startswith("-") and bool(_SECRET_NAME.search(flag))
        words.append(REDACTED if is_secret else f"{flag}={REDACTED}" if names_secret and equals else word)
        is_secret = names_secret and not equals
    return [_SECRET_VALUE.sub(REDACTED, word) for word in words]


def _short_path(path: str) -> str:
    """Relative to the current folder, the home folder or the one that holds this package; else only its last part."""
    for folder, prefix in ((Path.cwd(), ""), (PACKAGES, ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder):
            return f"{prefix}{Path(path).relative_to(folder)}"
    return f".../{Path(path).name}"


def _changed_settings(args: TrainingArguments, settings: dict[str, Any]) -> list[str]:
    """Names of the settings that differ from their defaults; None and empty values count as equal."""
    changed = []
    for field in dataclasses.fields(args):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = (DEFAULTS | RESOLVED_DEFAULTS).get(
            field.name, default
        )  # some fields are None until they are resolved
        value = getattr(args, field.name)
        is_empty = value in (None, "", [], {}) and default in (None, "", [], {})
        if field.name in settings and value != default and not is_empty and field.name not in REPLACED_FIELDS:
            changed.append(field.name)
    return changed


def _adapter_settings(model: Any) -> dict[str, Any]:
    """Settings of the trained adapter; empty for a model without one."""
    config = getattr(model, "peft_config", {}).get("default")
    settings = {} if config is None else config.to_dict()
    return {name: redact(settings[name]) for name in ADAPTER_FIELDS if settings.get(name) is not None}
