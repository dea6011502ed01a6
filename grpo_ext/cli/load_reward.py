"""Finds the reward that `--reward module:name` asks for."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def load_reward(path: str) -> Any:
    """The object `name` of the module in "module:name"; modules in the current folder are found as well.

    Raises:
        ImportError, AttributeError: there is no such module, or it has no such name.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: a file there may have the name of a module of Python
    return getattr(import_module(module), name)
