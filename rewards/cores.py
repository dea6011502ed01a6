"""The cores for the rewards of one training process."""

import os


def cores_per_process() -> int:
    """Cores that this process may use, divided among the processes that train on this machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
