"""Load the reward that `--reward module:name` names."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def load_reward(path: str) -> Any:
    """The object of a path "module:name"; the module may be in the current folder.

    Raises:
        ImportError, AttributeError: there is no such module, or no such object in it.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, because a file there may have the name of a standard module
    return getattr(import_module(module), name)
