"""One test of a program: what is called inside the sandbox, and whether what comes back is right, judged outside.

    assert_case("assert sorted(f([2, 1])) == [1, 2]")  ->  a Case that calls f([2, 1]), then sorted, and expects [1, 2]

Values compare as in Python (1 == 1.0 == True, a tuple is no list), but a float may differ from the right one by 1e-9 of
its size, and NaN equals NaN.
"""

import ast
import builtins
import functools
import json
import marshal
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewards.code.guest.calls import written

# How far a float may be from the right one, where a test does not say it.
TOLERANCES = {"rel_tol": 1e-9, "abs_tol": 1e-12}
# What a test may wrap around its call, and around its right value.
WRAPPERS = ("float", "frozenset", "int", "len", "list", "round", "set", "sorted", "str", "tuple")


@dataclass(frozen=True)
class Case:
    """Args:
    call: what `rewards.code.guest.calls` is to call.
    passes: whether a value is right, given what `json.loads` reads from its `written`; it raises on what is malformed.
    """

    call: bytes
    passes: Callable[[Any], bool]


def returns_case(function: str, arguments: list[Any], expected: object) -> Case:
    """`function(*arguments)` returns `expected`. A list equals a tuple here: JSON and Arrow know no tuples.

    Args:
        function: a name, or an expression such as `Solution().solve`, evaluated where the program ran.
        arguments: plain data, as is `expected`.

    Raises:
        ValueError: one of them is something else.
    """
    try:
        ast.parse(function.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"a function is called by its name, got {function!r}") from None
    if not isinstance(arguments, list):
        raise ValueError(f"a test's arguments are a list, got {arguments!r}")
    return Case(_call(function.strip(), arguments, {}, ()), _equals(expected, tuples_are_lists=True))


def assert_case(text: str) -> Case:
    """A test as data sets write it: a call with literal arguments, compared with a literal.

    `assert f(x) == y`, `assert f(x)`, `assert not f(x)`, `assert f(x) is None` (or True, or False),
    `assert math.isclose(f(x), y, rel_tol=z)`, `assert abs(f(x) - y) < z`, and `WRAPPERS` around the call.

    Raises:
        ValueError: it is none of these. This tells which rows to leave out of a data set.
    """
    try:
        (statement,) = ast.parse(text.strip()).body
        if not isinstance(statement, ast.Assert):
            raise ValueError("no assert")
        return _case(statement.test)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"the test {text!r} cannot be judged ({error}); valid is a call with literal arguments, compared with a "
            "literal, as in 'assert f([1, 2]) == 3'. rewards.code.cases.assert_case finds the rows to leave out."
        ) from None


def same(expected: object, got: Any, *, tuples_are_lists: bool = False) -> bool:
    """Whether a returned value is the right one, in time proportional to the size of the right one.

    Args:
        expected: plain data.
        got: what `json.loads` reads from the `written` of a value; it raises where that is malformed.
        tuples_are_lists: whether a list equals a tuple.
    """
    if isinstance(expected, float):
        value = _scalar(got)
        return math.isclose(value, expected, **TOLERANCES) or (math.isnan(value) and math.isnan(expected))
    if not isinstance(expected, list | tuple | set | frozenset | dict):
        return bool(_scalar(got) == expected)
    kind, *items = got
    if len(items) != len(expected):
        return False
    if isinstance(expected, dict):
        found = {_hashable(key): value for key, value in items}
        return kind == "dict" and all(
            key in found and same(value, found[key], tuples_are_lists=tuples_are_lists)
            for key, value in expected.items()
        )
    if isinstance(expected, set | frozenset):
        return kind == "set" and {_hashable(item) for item in items} == expected
    kinds = ["list", "tuple"] if tuples_are_lists else ["list" if isinstance(expected, list) else "tuple"]
    return kind in kinds and all(
        same(value, item, tuples_are_lists=tuples_are_lists) for value, item in zip(expected, items, strict=True)
    )


def _scalar(got: Any) -> Any:
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


def _hashable(got: Any) -> Any:
    """A member of a set or a key: no sets in there, since numbers made to collide fill a large one for minutes."""
    return tuple(map(_hashable, got[1:])) if isinstance(got, list) and got[0] == "tuple" else _scalar(got)


def _equals(expected: object, *, tuples_are_lists: bool = False) -> Callable[[Any], bool]:
    def passes(got: Any) -> bool:
        return same(expected, got, tuples_are_lists=tuples_are_lists)

    try:
        readable = passes(json.loads(written(expected)))
    except (TypeError, KeyError):
        readable = False
    if not readable:
        raise ValueError(f"{expected!r} is no plain data that can be compared")
    return passes


def _case(condition: ast.expr) -> Case:
    match condition:
        case ast.UnaryOp(op=ast.Not(), operand=call):
            return _called(call, _equals(False), ("bool",))
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            call, expected = _sides(left, right)
            return _called(call, _equals(expected))
        case ast.Compare(left=call, ops=[ast.Is()], comparators=[ast.Constant(value=None | True | False as value)]):
            return _called(call, lambda got: got is value)
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            call, expected = _sides(left, right)
            return _near(call, expected, rel_tol=0.0, abs_tol=_literal(bound))
        case ast.Call(
            func=ast.Name(id="isclose") | ast.Attribute(value=ast.Name(id="math"), attr="isclose"),
            args=[left, right],
            keywords=options,
        ):
            call, expected = _sides(left, right)
            return _near(call, expected, **{str(option.arg): _literal(option.value) for option in options})
    return _called(condition, _equals(True), ("bool",))


def _near(call: ast.expr, expected: Any, **tolerances: Any) -> Case:
    math.isclose(expected, expected, **tolerances)  # raises here, where it is the data's fault
    return _called(call, lambda got: math.isclose(_scalar(got), expected, **tolerances))


def _called(node: ast.expr, passes: Callable[[Any], bool], *wrappers: tuple[Any, ...]) -> Case:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"{ast.unparse(node)} is no call of a function by its name")
    if node.func.id in WRAPPERS and node.args and not _is_literal(node.args[0]):
        return _called(node.args[0], passes, (node.func.id, *map(_literal, node.args[1:])), *wrappers)
    keywords = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if None in keywords:
        raise ValueError("** is no literal argument")
    return Case(_call(node.func.id, list(map(_literal, node.args)), keywords, wrappers), passes)


def _call(function: str, arguments: list[Any], keywords: dict[str | None, Any], wrappers: tuple[Any, ...]) -> bytes:
    try:
        return marshal.dumps((function, arguments, keywords, wrappers))
    except ValueError:
        raise ValueError(f"the arguments are no plain data: {arguments!r}") from None


def _sides(left: ast.expr, right: ast.expr) -> tuple[ast.expr, Any]:
    """The call and the right value, whichever stands first."""
    return (right, _literal(left)) if _is_literal(left) else (left, _literal(right))


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in WRAPPERS:
            return getattr(builtins, name)(*map(_literal, arguments))
    return ast.literal_eval(node)


def _is_literal(node: ast.expr) -> bool:
    try:
        _literal(node)
    except (ValueError, TypeError):
        return False
    return True
