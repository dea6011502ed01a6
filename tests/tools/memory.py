"""Peak memory of an action, measured in forks of one process."""

import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil

CLEAR = Path("/proc/self/clear_refs")
# Environment of the measuring process. Freed blocks above 64 kB are returned to the system, so resident memory is live
# memory.
RETURN_FREED = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_above(action: Callable[[], None]) -> int:
    """Peak bytes of this process while it runs `action`, minus the bytes before."""
    before = psutil.Process().memory_info().rss
    if CLEAR.exists():
        CLEAR.write_text("5", encoding="utf-8")  # reset the kernel's high-water mark
        action()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before
    samples, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return max(samples) - before


def in_a_fork(measure: Callable[[], int]) -> int:
    """Measure in a fork of this process, so that no case reuses memory that another one left behind."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(measure()).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        value = answer.read()
    os.waitpid(child, 0)
    return int(value)
