"""A limit in seconds on a library call whose time depends on what a model wrote.

The limit is a signal: it holds in the main thread of a POSIX process only, and cannot interrupt one long operation in
C, such as a power of huge integers. Callers keep those away themselves; only a process of its own bounds everything.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class DeadlinePassed(BaseException):
    """Not an Exception: libraries that meet one inside a computation swallow it and go on."""


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """`function()`; in the main thread DeadlinePassed after so many seconds, and every tenth until it comes through."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return function()

    def stop(number: int, frame: FrameType | None) -> None:
        raise DeadlinePassed

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        try:
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also where the signal came in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
