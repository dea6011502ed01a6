"""Measures the memory of a process and all its descendants together.

    memory_exceeds(process.pid, 512 * 2**20)  ->  False

It counts pages in memory and in swap, excluding file-backed pages. Pages that processes share after a fork count once.
Everything is read from /proc: this needs no privileges and no control group, and works in containers.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

_RESIDENT = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap):\s*(\d+) kB", re.MULTILINE)
_PROPORTIONAL = re.compile(rb"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s*(\d+) kB", re.MULTILINE)


def memory_exceeds(root: int, limit: int) -> bool:
    """Whether the memory of a process and its descendants is more than `limit` bytes."""
    family = list(_family(root))
    # The first sum counts shared pages several times. It is cheap, and most programs are far below the limit.
    return _total(family, "status", _RESIDENT) > limit and _proportional_total(family) > limit


def _family(root: int) -> Iterator[Path]:
    """The folders in /proc of a process and its descendants."""
    left = [root]
    while left:
        folder = Path("/proc", str(left.pop()))
        yield folder
        with contextlib.suppress(OSError):  # the process has ended
            for children in folder.glob("task/*/children"):
                left += map(int, _read(children).split())


def _proportional_total(family: list[Path]) -> int:
    """Like `_total(family, "status", _RESIDENT)`, but each shared page is divided among its processes.

    A process whose proportional sizes cannot be read counts in full.
    """
    return sum(
        _total([folder], "smaps_rollup", _PROPORTIONAL) or _total([folder], "status", _RESIDENT) for folder in family
    )


def _total(family: list[Path], file: str, counted: re.Pattern[bytes]) -> int:
    return sum(1024 * int(size) for folder in family for size in counted.findall(_read(folder / file)))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # the process has ended, or this user may not read its file
        return b""
