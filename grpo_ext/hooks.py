"""Hooks and other attributes of a trainer, replaced on the object for the length of a call.

A hook that TRL calls on `self` finds the attribute of the object before that of its class, so TRL calls the
replacement even if a subclass overrides the hook.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(trainer: object, **hooks: Any) -> Iterator[None]:
    """A context in which the trainer has these hooks or attributes instead of its own."""
    own = {name: vars(trainer)[name] for name in hooks if name in vars(trainer)}
    vars(trainer).update(hooks)
    try:
        yield
    finally:
        for name in hooks:
            del vars(trainer)[name]
        vars(trainer).update(own)


@contextmanager
def results_of(trainer: object, name: str) -> Iterator[list[Any]]:
    """A context that collects what the outermost override of a hook returns to TRL."""
    results: list[Any] = []
    hook = getattr(trainer, name)

    def observed(*args: Any, **kwargs: Any) -> Any:
        results.append(hook(*args, **kwargs))
        return results[-1]

    with replaced(trainer, **{name: observed}):
        yield results
