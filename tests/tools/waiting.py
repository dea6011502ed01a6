"""Wait for a condition, however busy the machine is."""

import time
from collections.abc import Callable

# Seconds after which waiting ends. Only a hang takes that long, so no test fails because the machine is busy.
PATIENCE = 1800


def becomes(condition: Callable[[], object]) -> bool:
    """Whether the condition becomes true within PATIENCE; returns as soon as it does."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())
