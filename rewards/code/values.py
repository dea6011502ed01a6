"""Compares a value that a program returned with the expected one.

    values_equal([1, 2.0], json.loads(encode_value([1, 2])))  ->  True

Values compare as in Python (1 == 1.0 == True, and a tuple is not a list), with two exceptions: a float may have a
relative error of 1e-9, and NaN equals NaN.
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

from grpo_ext.rewards.code.guest.run_calls import encode_value

# Tolerances of `math.isclose` for floats, unless a test states its own.
TOLERANCES = {"rel_tol": 1e-9, "abs_tol": 1e-12}


def equality_check(expected: object, *, tuples_are_lists: bool = False) -> Callable[[Any], bool]:
    """`values_equal` with this expected value.

    Raises:
        ValueError: the expected value is not plain data, so nothing could equal it.
    """

    def accepts(got: Any) -> bool:
        return values_equal(expected, got, tuples_are_lists=tuples_are_lists)

    try:
        comparable = accepts(json.loads(encode_value(expected)))
    except (TypeError, KeyError):
        comparable = False
    if not comparable:
        raise ValueError(f"{expected!r} is not plain data that can be compared")
    return accepts


def values_equal(expected: object, got: Any, *, tuples_are_lists: bool = False) -> bool:
    """Whether a returned value equals the expected one, in time proportional to the size of the expected one.

    Args:
        expected: plain data.
        got: the returned value as `json.loads(encode_value(value))`.
        tuples_are_lists: whether a list equals a tuple.

    Raises:
        Exception: `got` is malformed. The type depends on how.
    """
    if isinstance(expected, float):
        value = decode_scalar(got)
        return math.isclose(value, expected, **TOLERANCES) or (math.isnan(value) and math.isnan(expected))
    if not isinstance(expected, list | tuple | set | frozenset | dict):
        return bool(decode_scalar(got) == expected)
    kind, *items = got
    if len(items) != len(expected):
        return False
    if isinstance(expected, dict):
        found = {_decode_hashable(key): value for key, value in items}
        return kind == "dict" and all(
            key in found and values_equal(value, found[key], tuples_are_lists=tuples_are_lists)
            for key, value in expected.items()
        )
    if isinstance(expected, set | frozenset):
        return kind == "set" and {_decode_hashable(item) for item in items} == expected
    kinds = ["list", "tuple"] if tuples_are_lists else ["list" if isinstance(expected, list) else "tuple"]
    return kind in kinds and all(
        values_equal(value, item, tuples_are_lists=tuples_are_lists)
        for value, item in zip(expected, items, strict=True)
    )


def decode_scalar(got: Any) -> Any:
    """Decode a value that has no items: None, a boolean, a number, text or bytes."""
    if isinstance(got, str):
        return bytes.fromhex(got).decode("utf-8", "surrogatepass")
    if not isinstance(got, list):
        return got
    kind, *parts = got
    readers: dict[str, Callable[..., Any]] = {
        "int": functools.partial(int, base=16),
        "complex": complex,
        "bytes": bytes.fromhex,
    }
    return readers[kind](*parts)


def _decode_hashable(got: Any) -> Any:
    """Decode a member of a set or a key. Nested sets are rejected: colliding numbers make a large one take minutes."""
    return tuple(map(_decode_hashable, got[1:])) if isinstance(got, list) and got[0] == "tuple" else decode_scalar(got)
