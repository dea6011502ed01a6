"""Wait for what will happen, however busy the machine is."""

import time
from collections.abc import Callable

# Seconds after which a wait is given up. Only what hangs takes as long, so no test fails because a machine is busy.
PATIENCE = 1800


def becomes(condition: Callable[[], object]) -> bool:
    """Whether the condition comes true before PATIENCE is over; returns as soon as it does."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())
