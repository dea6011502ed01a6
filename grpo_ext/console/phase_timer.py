"""Time the phases of a step: generate, reward, reference, update.

    phases = PhaseTimer()
    with phases("generate"):
        ...
    phases.pop()  # {"generate": 1.9}

Time in a nested phase counts only for the inner phase.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Wall-clock seconds per phase since the last `pop`. On an accelerator, a phase ends when its work is done."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._last_switch = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block for `phase`."""
        self._switch()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        """Add the time since the last switch to the innermost phase."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._last_switch
        self._last_switch = now

    def pop(self) -> dict[str, float]:
        """Return phase -> seconds, and reset to zero."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
