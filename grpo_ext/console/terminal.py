"""Print text, tables and progress bars in such a way that printing never ends a run.

    show("held-out pass@1 0.12 -> 0.41")        a line
    show(Panel(table))                          an object of rich
    for start in bar(range(0, 256, 64), "held-out accuracy"): ...

A character that the stream cannot encode (cp1252, ASCII) is written as its escape, for example \\u95ee. Text that
cannot be written at all (closed stream, broken pipe, full disk) is dropped.
"""

import io
import os
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from tqdm.auto import tqdm

ESCAPES = "backslashreplace"  # error handler: writes the code points of characters that cannot be encoded


class ForgivingStream:
    """A wrapper of a text stream whose `write` and `flush` never raise; everything else is the stream's own.

    Args:
        stream: the stream; may be None, as are the standard streams of a program without a terminal.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __eq__(self, other: object) -> bool:  # so that tqdm clears its bars before output to either standard stream
        return isinstance(other, ForgivingStream)

    def __hash__(self) -> int:
        return hash(ForgivingStream)

    def __getattr__(self, name: str) -> Any:
        return getattr(io.StringIO() if self._stream is None else self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if possible; returns its length in any case."""
        if self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with self._dropping():
                self._stream.write(text.encode(encoding, ESCAPES).decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; drop text that cannot be written."""
        if self._stream is not None:
            with self._dropping():
                self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # closed
            pass
        except OSError:  # a broken pipe, a full disk
            with suppress(OSError, ValueError):
                _empty(cast(TextIO, self._stream))


def _empty(stream: TextIO) -> None:
    """Drop the text that a stream could not write: Python would try again when it exits, and exit with an error."""
    descriptor = stream.fileno()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
        stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)


def show(what: RenderableType) -> None:
    """Print a line of text or an object of rich to standard output. Square brackets are not treated as markup."""
    out = cast(TextIO, ForgivingStream(sys.stdout))
    with tqdm.external_write_mode(file=out):  # clears progress bars meanwhile
        if isinstance(what, str):
            out.write(f"{what}\n")
        else:
            Console(file=out, markup=False, emoji=False).print(what)
        out.flush()


def bar(
    steps: Sized | None = None,
    description: str | None = None,
    *,
    total: int | None = None,
    leave: bool = False,
    disable: bool = False,
) -> tqdm:
    """A progress bar on standard error, over these steps or up to `total`; it disappears at its end unless `leave`."""
    stream = ForgivingStream(sys.stderr)
    return tqdm(steps, desc=description, total=total, leave=leave, disable=disable, dynamic_ncols=True, file=stream)


@contextmanager
def forgiving_stdout() -> Iterator[None]:
    """A context in which printing never raises, including in other libraries."""
    with redirect_stdout(cast(TextIO, ForgivingStream(sys.stdout))):
        yield


@contextmanager
def escaping_unencodable() -> Iterator[None]:
    """A context in which standard output escapes characters that it cannot encode, for any `print`."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.closed or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors=ESCAPES)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # the stream may have been closed meanwhile
            stream.reconfigure(errors="strict")
