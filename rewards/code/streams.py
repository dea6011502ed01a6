r"""Tests a program by its standard output: which outputs are correct.

    same_output(b"0.30000000000000004\n", "0.3")  ->  True
    same_output(b"3\n", "3.0")                    ->  True
    same_output(b"3.0\n", "3")                    ->  False

White space at the end of lines and of the output is ignored. A number with a decimal point or an exponent in the
expected output is compared by value, within a tolerance. Everything else is compared as text.
"""

import math
import re
from dataclasses import dataclass

from grpo_ext.rewards.code.values import TOLERANCES

FLOAT = re.compile(rb"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d{1,4})?")
NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")


@dataclass(frozen=True, kw_only=True)
class StreamTest:
    """A standard input, and the standard output that a program must write.

    Args:
        stdin: the standard input.
        stdout: the expected output.
        tolerance: relative and absolute error that a float may have.
    """

    stdin: str
    stdout: str
    tolerance: float | None = None

    def accepts(self, output: bytes) -> bool:
        """Whether an output is correct."""
        return same_output(output, self.stdout, tolerance=self.tolerance)


def same_output(output: bytes, expected: str, *, tolerance: float | None = None) -> bool:
    """Whether an output equals the expected one.

    Args:
        output: what the program wrote.
        expected: what it should write.
        tolerance: relative and absolute error that a float may have. None means a relative error of 1e-9.
    """
    ours, theirs = _stripped_lines(output), _stripped_lines(expected.encode("utf-8", "surrogatepass"))
    tolerances = TOLERANCES if tolerance is None else {"rel_tol": tolerance, "abs_tol": tolerance}
    return len(ours) == len(theirs) and all(
        line == wanted or _same_numbers(line.split(), wanted.split(), tolerances)
        for line, wanted in zip(ours, theirs, strict=True)
    )


def _same_numbers(words: list[bytes], expected: list[bytes], tolerances: dict[str, float]) -> bool:
    """Whether a line with at least one float equals the expected one, word by word."""
    if len(words) != len(expected) or not any(map(FLOAT.fullmatch, expected)):
        return False
    return all(
        word == wanted
        or bool(
            FLOAT.fullmatch(wanted)
            and NUMBER.fullmatch(word)
            and math.isfinite(float(wanted))
            and math.isclose(float(word), float(wanted), **tolerances)
        )
        for word, wanted in zip(words, expected, strict=True)
    )


def _stripped_lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]
