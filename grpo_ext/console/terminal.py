"""Everything that is printed goes through here, and none of it can end a run.

    show("held-out pass@1 0.12 -> 0.41")        a line
    show(Panel(table))                          what rich draws
    for start in bar(range(0, 256, 64), "held-out accuracy"): ...

A character that the stream cannot encode (cp1252, ASCII) is written as its escape, for example \\u95ee. What a stream
cannot take (closed, a broken pipe, a full disk) is dropped.
"""

import io
import os
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from tqdm.auto import tqdm

ESCAPES = "backslashreplace"  # the error handler: the code point of what cannot be encoded


class ForgivingStream:
    """A text stream that writes what it can to another one; everything but `write` and `flush` is that of the other.

    Args:
        stream: may be None, as the standard streams of a program without a terminal are.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __eq__(self, other: object) -> bool:  # so tqdm clears its bars for what is written to either stream
        return isinstance(other, ForgivingStream)

    def __hash__(self) -> int:
        return hash(ForgivingStream)

    def __getattr__(self, name: str) -> Any:
        return getattr(io.StringIO() if self._stream is None else self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; its length is returned, whatever became of it."""
        if self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with self._dropping():
                self._stream.write(text.encode(encoding, ESCAPES).decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; drop what it cannot take."""
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
    """Drop what a stream holds and could not write: Python would try again when it exits, and exit with an error."""
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
    """Print a line of text as it is, or what rich draws, to standard output. Square brackets are no markup."""
    out = cast(TextIO, ForgivingStream(sys.stdout))
    with tqdm.external_write_mode(file=out):  # bars make way
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
    """A context in which everything that is printed is forgiven, also what other libraries print."""
    with redirect_stdout(cast(TextIO, ForgivingStream(sys.stdout))):
        yield


@contextmanager
def escaping_unencodable() -> Iterator[None]:
    """A context in which standard output takes every character, also from the user's own `print`."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.closed or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors=ESCAPES)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # it may have been closed meanwhile
            stream.reconfigure(errors="strict")
