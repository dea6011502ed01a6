"""Files of one JSON object a line, each with its `step`: written as the run goes, readable at any time.

A process that is killed may leave half a line behind. Reading passes over it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append_line(path: Path, row: Row) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Put these rows in place of what the file holds; a process that is killed meanwhile leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    new.replace(path)


def read_lines(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; none where there is no file."""
    if path.exists():
        with path.open() as file:
            for line in file:
                row = parsed(line)
                if row is not None:
                    yield row


def parsed(line: str | bytes) -> Row | None:
    """The row of a line, or None where a kill cut it short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def keep_lines(path: Path, step: int) -> None:
    """Begin where a run begins: keep the rows up to the step that it resumes from, and none in a fresh run (step 0)."""
    write_lines(path, (row for row in read_lines(path) if row["step"] <= step) if step else ())
