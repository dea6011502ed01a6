"""The files of a run in its `output_dir`: their names, and JSON lines that can be read while they are being written.

    metrics.jsonl   {"step": 1, "reward": 0.42, ...}
                    {"step": 2, "rewa                 a killed process may leave half a line behind; readers skip it

A page shows only a part of a long file: `read_downsampled` keeps the newest rows, and every k-th of the older ones.

    choose_rows([10] * 100, budget=300)  ->  [0, 8, 16, ..., 88, 90, 91, ..., 99], 8
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
HELDOUT_FILE = "heldout.jsonl"
SETTINGS_FILE = "run.json"
SUMMARY_FILE = "summary.json"
CURVES_FILE = "curves.png"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"

NEWEST_ROWS = 10  # always kept by `choose_rows` if they fit

Row = dict[str, Any]

logger = logging.getLogger(__name__)


# JSON lines


def append_row(path: Path, row: Row) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the contents of a file; if the process is killed meanwhile, the file is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    new.replace(path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; none if there is no file."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = parse_row(line)
                if row is not None:
                    yield row


def parse_row(line: str | bytes) -> Row | None:
    """The row of a line; None if a kill cut the line short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def keep_rows_until(path: Path, step: int) -> None:
    """Start a file for a run that starts after `step`: keep the rows up to that step, or none in a new run (step 0)."""
    write_rows(path, (row for row in read_rows(path) if row["step"] <= step) if step else ())


# Parts of long files


def choose_rows(sizes: list[int], budget: int) -> tuple[list[int], int]:
    """Indices of the rows to keep, and the distance k between the older ones of them.

    All rows are kept if they fit. Otherwise, the newest ten are kept, and the first and every k-th of the older ones,
    with the smallest power of two k for which they fit. If the newest ten do not fit either, as many of them as fit are
    kept, at least one.

    Args:
        sizes: sizes of the rows, oldest first, in the unit of `budget`.
        budget: maximum total size.
    """
    count, every = len(sizes), 1
    while every < 2 * count:
        kept = [i for i in range(count) if i % every == 0 or i >= count - NEWEST_ROWS]
        if sum(sizes[i] for i in kept) <= budget:
            return kept, every
        every *= 2
    first = count - 1
    while first > 0 and sum(sizes[first - 1 :]) <= budget:
        first -= 1
    return list(range(max(first, 0), count)), every


def read_downsampled(path: Path, budget: int) -> tuple[list[Row], int]:
    """Rows of up to about `budget` bytes in total, and the distance between the older ones of them.

    Skipped lines are not parsed, and only one of them is in memory at a time.
    """
    if not path.exists():
        return [], 1
    with path.open("rb") as file:
        lines = [(file.tell() - len(line), len(line)) for line in iter(file.readline, b"")]
        kept, every = choose_rows([size for _, size in lines], budget)
        rows = []
        for i in kept:
            start, size = lines[i]
            file.seek(start)
            row = parse_row(file.read(size))
            if row is not None:
                rows.append(row)
    return rows, every


# Plots and the page


def draw_or_warn(draw: Callable[[str], Path], output_dir: str) -> None:
    """Draw the plots or the page of a run; an error becomes a warning, because it must not end the run."""
    try:
        draw(output_dir)
    except Exception as error:
        logger.warning(
            f"The report of the run could not be written ({error!r}). Once this is fixed, run: grpo-ext report "
            f"{output_dir}"
        )
