"""Where the seconds of a step went: generate, reward, reference, update.

    phases = PhaseTimer()
    with phases("generate"):
        ...
    phases.pop()  # {"generate": 1.9}

A phase entered inside another one is counted once, under the inner name.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Wall-clock seconds per phase since the last `pop`. On an accelerator, phases end when its queue is empty."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block under `phase`."""
        self._turn()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        """Book the time since the last turn on the phase that was running."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def pop(self) -> dict[str, float]:
        """Phase -> seconds, and start again from zero."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
