"""A time limit for library calls whose run time depends on model-written text.

    run_with_deadline(2.0, lambda: sympy.simplify(expression))  ->  its result, or DeadlineExceeded after 2 seconds

The limit is a timer signal. It works only in the main thread of a POSIX process, and it cannot interrupt a single long
operation in C, such as a power of huge integers. Callers must reject such inputs first. Only a separate process bounds
every call: see `grpo_ext.rewards.workers.pool`.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class DeadlineExceeded(BaseException):
    """The call took too long. A BaseException, since libraries catch any `Exception` in a computation and carry on."""


def run_with_deadline(seconds: float, function: Callable[[], Result]) -> Result:
    """Return `function()`. No limit applies outside the main thread, or if the system has no interval timers.

    Args:
        seconds: time limit, above 0.
        function: called without arguments.

    Raises:
        DeadlineExceeded: the call took longer. It is raised again every 0.1 s in case the call swallows it, and
            replaces whatever the call then returns or raises.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return function()

    is_over = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True
        raise DeadlineExceeded

    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
            result = function()
        except Exception as error:
            if is_over:
                raise DeadlineExceeded from error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if is_over:
            raise DeadlineExceeded
        return result
    finally:  # runs even if the signal arrives in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
