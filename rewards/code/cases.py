"""Tests a program by calling a function: the call runs inside the sandbox, and its value is checked outside.

    assert_case("assert sorted(f([2, 1])) == [1, 2]")  ->  a Case that calls f([2, 1]), then sorted, and expects [1, 2]

Values compare as in Python (1 == 1.0 == True, and a tuple is not a list), with two exceptions: a float may have a
relative error of 1e-9, and NaN equals NaN.
"""

import ast
import builtins
import contextlib
import functools
import json
import marshal
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_ext.rewards.code.guest.run_calls import encode_value

# Tolerances of `math.isclose` for floats, unless a test states its own.
TOLERANCES = {"rel_tol": 1e-9, "abs_tol": 1e-12}
# Builtins that a test may wrap around its call and around its expected value.
WRAPPERS = ("float", "frozenset", "int", "len", "list", "round", "set", "sorted", "str", "tuple")


@dataclass(frozen=True)
class Case:
    """A call, and the check of its value.

    Args:
        call: an item of "calls" in the input of `grpo_ext.rewards.code.guest.run_calls`.
        accepts: whether a value is correct. It takes the value as `json.loads(encode_value(value))`, and raises on
            malformed input.
    """

    call: bytes
    accepts: Callable[[Any], bool]


def returns_any_case(function: str, arguments: list[Any], expected: list[object]) -> Case:
    """The test that `function(*arguments)` returns one of the values in `expected`; see `returns_case`."""
    cases = [returns_case(function, arguments, value) for value in expected]

    def accepts(got: Any) -> bool:
        for case in cases:
            with contextlib.suppress(Exception):  # malformed for this value, but perhaps not for the next
                if case.accepts(got):
                    return True
        return False

    return Case(cases[0].call, accepts)


def returns_case(function: str, arguments: list[Any], expected: object) -> Case:
    """The test that `function(*arguments)` returns `expected`. A list equals a tuple: JSON and Arrow have no tuples.

    Args:
        function: a name, or an expression such as `Solution().solve`, evaluated in the namespace of the program.
        arguments: plain data.
        expected: plain data.

    Raises:
        ValueError: `function` is not an expression, `arguments` is not a list, or some value is not plain data.
    """
    try:
        ast.parse(function.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(
            f"the function must be a name or an expression, such as 'Solution().solve'; got {function!r}"
        ) from None
    if not isinstance(arguments, list):
        raise ValueError(f"the arguments of a test must be a list; got {arguments!r}")
    return Case(_encode_call(function.strip(), arguments, {}, ()), _expect_equal(expected, tuples_are_lists=True))


def assert_case(text: str) -> Case:
    """Parse a test in the form that data sets use: a call with constant arguments, compared with a constant.

    Supported: `assert f(x) == y`, `assert f(x)`, `assert not f(x)`, `assert f(x) is None` (or True, or False),
    `assert math.isclose(f(x), y, rel_tol=z)`, `assert abs(f(x) - y) < z`, and `WRAPPERS` around the call. Any
    value passes `assert f(x) == f(x)`. A call may be that of a method, `Solution().f(x)`. A constant may have
    arithmetic, such as `1.0 / 3`, `3 * 19` and `"a" + "b"`.

    Raises:
        ValueError: the test has none of these forms. Use this to find the rows to drop from a data set.
    """
    try:
        (statement,) = ast.parse(text.strip()).body
        if not isinstance(statement, ast.Assert):
            raise ValueError("it is not an assert statement")
        return _case_of_condition(statement.test)
    except (ValueError, TypeError, ArithmeticError, SyntaxError) as error:
        raise ValueError(
            f"the test {text!r} is not supported ({error}). Valid: a call with constant arguments, compared with "
            "a constant, as in 'assert f([1, 2]) == 3'. grpo_ext.rewards.code.cases.assert_case finds the rows to drop."
        ) from None


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
        value = _decode_scalar(got)
        return math.isclose(value, expected, **TOLERANCES) or (math.isnan(value) and math.isnan(expected))
    if not isinstance(expected, list | tuple | set | frozenset | dict):
        return bool(_decode_scalar(got) == expected)
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


def _decode_scalar(got: Any) -> Any:
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
    return tuple(map(_decode_hashable, got[1:])) if isinstance(got, list) and got[0] == "tuple" else _decode_scalar(got)


def _expect_equal(expected: object, *, tuples_are_lists: bool = False) -> Callable[[Any], bool]:
    def accepts(got: Any) -> bool:
        return values_equal(expected, got, tuples_are_lists=tuples_are_lists)

    try:
        comparable = accepts(json.loads(encode_value(expected)))
    except (TypeError, KeyError):
        comparable = False
    if not comparable:
        raise ValueError(f"{expected!r} is not plain data that can be compared")
    return accepts


def _case_of_condition(condition: ast.expr) -> Case:
    match condition:
        case ast.UnaryOp(op=ast.Not(), operand=call):
            return _case_of_call(call, _expect_equal(False), ("bool",))
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]) if ast.dump(left) == ast.dump(right):
            return _case_of_call(left, lambda got: True)  # it only has to return
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            call, expected = _call_and_expected(left, right)
            return _case_of_call(call, _expect_equal(expected))
        case ast.Compare(left=call, ops=[ast.Is()], comparators=[ast.Constant(value=None | True | False as value)]):
            return _case_of_call(call, lambda got: got is value)
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            call, expected = _call_and_expected(left, right)
            return _expect_close(call, expected, rel_tol=0.0, abs_tol=_literal_value(bound))
        case ast.Call(
            func=ast.Name(id="isclose") | ast.Attribute(value=ast.Name(id="math"), attr="isclose"),
            args=[left, right],
            keywords=options,
        ):
            call, expected = _call_and_expected(left, right)
            return _expect_close(
                call, expected, **{str(option.arg): _literal_value(option.value) for option in options}
            )
    return _case_of_call(condition, _expect_equal(True), ("bool",))


def _expect_close(call: ast.expr, expected: Any, **tolerances: Any) -> Case:
    math.isclose(expected, expected, **tolerances)  # raises here if the tolerances are invalid
    return _case_of_call(call, lambda got: math.isclose(_decode_scalar(got), expected, **tolerances))


def _case_of_call(node: ast.expr, accepts: Callable[[Any], bool], *wrappers: tuple[Any, ...]) -> Case:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[inner, *more]) if name in WRAPPERS and not _is_literal(inner):
            return _case_of_call(inner, accepts, (name, *map(_literal_value, more)), *wrappers)
        case ast.Call(func=ast.Name()):
            pass
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(), args=made_of, keywords=[]))):
            for argument in made_of:
                _literal_value(argument)
        case _:
            raise ValueError(f"{ast.unparse(node)} is not a call of a function by its name, or of a method")
    keywords = {keyword.arg: _literal_value(keyword.value) for keyword in node.keywords}
    if None in keywords:
        raise ValueError("** is not a literal argument")
    return Case(_encode_call(ast.unparse(node.func), list(map(_literal_value, node.args)), keywords, wrappers), accepts)


def _encode_call(
    function: str, arguments: list[Any], keywords: dict[str | None, Any], wrappers: tuple[Any, ...]
) -> bytes:
    try:
        return marshal.dumps((function, arguments, keywords, wrappers))
    except ValueError:
        raise ValueError(f"the arguments are not plain data: {arguments!r}") from None


def _call_and_expected(left: ast.expr, right: ast.expr) -> tuple[ast.expr, Any]:
    """The call and the expected value, whichever comes first."""
    return (right, _literal_value(left)) if _is_literal(left) else (left, _literal_value(right))


def _literal_value(node: ast.expr) -> Any:
    """The value of a constant expression.

    Raises:
        ValueError, TypeError, ArithmeticError: it is not constant, or cannot be computed.
    """
    match node:
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in WRAPPERS:
            return getattr(builtins, name)(*map(_literal_value, arguments))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            return _computed(_ARITHMETIC[type(sign)], _literal_value(left), _literal_value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_literal_value(operand)
        case ast.List(elts=items):
            return list(map(_literal_value, items))
        case ast.Tuple(elts=items):
            return tuple(map(_literal_value, items))
        case ast.Set(elts=items):
            return set(map(_literal_value, items))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_literal_value(key): _literal_value(value) for key, value in zip(keys, values, strict=True) if key}
    return ast.literal_eval(node)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
MAX_CONSTANT = 100_000  # items of a repeated constant, or bits of a power


def _computed(compute: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """`compute(left, right)`, unless the result could be huge."""
    size = 0
    if compute is operator.mul:
        for items, count in ((left, right), (right, left)):
            if hasattr(items, "__len__") and isinstance(count, int):
                size = len(items) * count
    elif compute is operator.mod and not isinstance(left, int | float):
        raise ValueError("formatting is not a constant")  # "%1000000000d" % 1
    elif compute is operator.pow and isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * right
    if size > MAX_CONSTANT:
        raise ValueError(f"a constant has a size of {size}; at most {MAX_CONSTANT} is supported")
    return compute(left, right)


def _is_literal(node: ast.expr) -> bool:
    try:
        _literal_value(node)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True
