"""The commands of `grpo-ext`, one a file: `add_arguments(parser)` and `run(options)`."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def named(path: str) -> Any:
    """What `module:name` names; modules in the current folder are found, too.

    Raises:
        ImportError, AttributeError: there is no such module, or nothing of that name in it.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: a file there may have the name of a module of Python
    return getattr(import_module(module), name)
