"""Which lines of a long record a page has room for: the newest ones, and older ones at even distances.

chosen([10] * 100, room=300)  ->  [0, 8, 16, ..., 88, 90, 91, ..., 99], 8
"""

from pathlib import Path

from grpo_ext.report.jsonl import Row, parsed

NEWEST = 10


def chosen(sizes: list[int], room: int) -> tuple[list[int], int]:
    """Indices of the lines to keep, and the distance between the older ones of them.

    All where they fit. Else the newest ten, and of the older ones the first and every k-th after it, k the smallest
    power of two for which they fit. Else as many of the newest as fit, and one at least.
    """
    count, every = len(sizes), 1
    while every < 2 * count:
        kept = [i for i in range(count) if i % every == 0 or i >= count - NEWEST]
        if sum(sizes[i] for i in kept) <= room:
            return kept, every
        every *= 2
    first = count - 1
    while first > 0 and sum(sizes[first - 1 :]) <= room:
        first -= 1
    return list(range(max(first, 0), count)), every


def read_thinned(path: Path, room: int) -> tuple[list[Row], int]:
    """Rows of a file of lines that take at most about `room` bytes, and the distance between the older ones of them.

    Lines that are left out are not parsed, and no more than one line is in memory beside those that are kept.
    """
    if not path.exists():
        return [], 1
    with path.open("rb") as file:
        lines = [(file.tell() - len(line), len(line)) for line in iter(file.readline, b"")]
        kept, every = chosen([size for _, size in lines], room)
        rows = []
        for i in kept:
            start, size = lines[i]
            file.seek(start)
            row = parsed(file.read(size))
            if row is not None:
                rows.append(row)
    return rows, every
