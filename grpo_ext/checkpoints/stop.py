"""End a run early and well: a signal or a time limit asks for it, and the trainer ends the run after the current step.

    stop = Stop(max_hours=3.5, largest=lambda code: code)
    with stop.on_signals(signal.SIGTERM, signal.SIGINT):
        ...                             # SIGTERM raises Stopped: there is nothing to save
        stop.defers = True              # steps are running
        ...                             # SIGTERM is noted
        stop.is_due()                   # True at the end of the step; stop.reason is "SIGTERM"

The end of an optimizer step is the only moment at which model, optimizer, random state, rollout and loader belong
together. A rollout that serves several steps may be in progress there, and is saved with the rest.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Exit code of a process that ended for this reason, the weakest reason first. 75 is EX_TEMPFAIL: try again.
EXIT_CODES = {"max_hours": 75, "SIGTERM": 128 + signal.SIGTERM, "SIGINT": 128 + signal.SIGINT}
REASONS = (None, *EXIT_CODES)


class Stopped(SystemExit):
    """The run was ended early.

    Attributes:
        reason: "SIGTERM", "SIGINT" or "max_hours".
    """

    def __init__(self, reason: str):
        super().__init__(EXIT_CODES[reason])
        self.reason = reason


class Stop:
    """Whether a run is to end early, and why.

    Args:
        max_hours: hours from now after which it is to end; None for no limit.
        largest: returns the largest of the numbers with which all processes call it.

    Attributes:
        reason: "SIGTERM", "SIGINT" or "max_hours", once all processes have agreed on it; else None.
        defers: whether a signal ends the run when `is_due` is called next, instead of at once.
    """

    def __init__(self, max_hours: float | None, largest: Callable[[int], int]):
        self.reason: str | None = None
        self.defers = False
        self._end = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._largest = largest
        self._asked = 0  # index in REASONS
        self._contexts = 0

    @property
    def is_listening(self) -> bool:
        """Whether signals are handled."""
        return self._contexts > 0

    @contextmanager
    def on_signals(self, *numbers: signal.Signals) -> Iterator[None]:
        """A context in which these signals ask for the end; the handlers are restored at its end. After the first
        SIGINT, a second one ends the process at once. Python handles signals in its main thread only, so a context in
        another thread changes nothing."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            process = os.getpid()
            before = {n: signal.signal(n, lambda number, _: self._receive(number, process)) for n in numbers}
        self._contexts += 1
        try:
            yield
        finally:
            self._contexts -= 1
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def is_due(self) -> bool:
        """Whether the run is to end here. All processes must call this at the same point; all get the same answer."""
        if self.reason is None and (self.is_listening or self._end is not None):
            if not self._asked and self._end is not None and time.monotonic() >= self._end:
                self._asked = REASONS.index("max_hours")
            self.reason = REASONS[self._largest(self._asked)]
        return self.reason is not None

    def forget(self) -> None:
        """Begin another training."""
        self.reason, self._asked = None, 0

    def _receive(self, number: int, process: int) -> None:
        name = signal.Signals(number).name
        if os.getpid() != process:  # a fork, such as a worker of a data loader: the training process ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._asked = max(self._asked, REASONS.index(name))
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.defers:
            raise Stopped(name)
        hint = "; Ctrl-C again ends it at once, without one" if number == signal.SIGINT else ""
        text = f"\n{name}: the run ends after this step, with a checkpoint{hint}\n"
        with suppress(OSError):  # a closed stream; `print` could interrupt another `print`
            os.write(2, text.encode() if os.environ.get("RANK", "0") == "0" else b"")


def start_loader_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker of a data loader that survives SIGINT and SIGTERM. A terminal, a launcher or a scheduler sends
    them to all processes, but the training process still needs its workers until its step is over.

    Args:
        init: the `worker_init_fn` that the data loader had.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
