"""Save the state that one optimizer step passes to the next, as two files per process: JSON, and the tensors in it.

save_states(folder, 0, {"temperature": {"temperature": 0.8, ...}, "trainer": {"rollout": [{"advantages": tensor}]}})

state_0.json            {"temperature": {"temperature": 0.8, ...}, "trainer": {"rollout": [{"advantages": ...}]}}
state_0.safetensors     trainer/rollout/0/advantages
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE, TENSORS_FILE = "state_{}.json", "state_{}.safetensors"
TENSOR, ON_HOST = "__tensor__", "on_host"  # keys of the JSON object that represents a tensor


@runtime_checkable
class Stateful(Protocol):
    """An object with state that is carried from step to step: JSON values and tensors, in dicts with string keys and in
    lists."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_states(folder: Path, process: int, states: Mapping[str, dict[str, Any]]) -> None:
    """Write the states of this process."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(states, "", tensors))
    if tensors:
        save_file(tensors, folder / TENSORS_FILE.format(process))
    (folder / STATE_FILE.format(process)).write_text(text, encoding="utf-8")


def has_states(folder: Path, process: int) -> bool:
    """Whether the state file of this process has the current format."""
    states = json.loads((folder / STATE_FILE.format(process)).read_text(encoding="utf-8"))
    return all(isinstance(state, dict) for state in states.values())


def is_in_rollout(folder: Path) -> bool:
    """Whether the checkpoint was written in the middle of a rollout."""
    return "rollout" in json.loads((folder / STATE_FILE.format(0)).read_text(encoding="utf-8")).get("trainer", {})


def load_states(folder: Path, process: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Read the states that `save_states` wrote; tensors that were not in host memory are moved to `device`."""
    path = folder / TENSORS_FILE.format(process)
    tensors = load_file(path) if path.exists() else {}
    return _with_tensors(json.loads((folder / STATE_FILE.format(process)).read_text(encoding="utf-8")), tensors, device)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: path, ON_HOST: value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {name: _without_tensors(part, f"{path}/{name}".lstrip("/"), tensors) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_with_tensors(part, tensors, device) for part in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        tensor = tensors[value[TENSOR]]
        return tensor if value[ON_HOST] else tensor.to(device)
    return {name: _with_tensors(part, tensors, device) for name, part in value.items()}
