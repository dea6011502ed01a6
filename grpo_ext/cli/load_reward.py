"""Load the reward that `--reward module:name` names."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def load_reward(path: str) -> Any:
    """The object of a path "module:name"; the module may be in the current folder.

    Raises:
        ImportError: there is no such module.
        ValueError: the path has another form, or the module has no such object.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"--reward {path} must be module:name, for example grpo_ext.rewards:math_answer_reward.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, because a file there may have the name of a standard module
    found = import_module(module)
    try:
        return getattr(found, name)
    except AttributeError:
        raise ValueError(f"--reward {path}: the module {module} has no {name}.") from None
