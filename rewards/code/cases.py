"""Tests a program by calling a function: the call runs inside the sandbox, and its value is checked outside.

    assert_case("assert sorted(f([2, 1])) == [1, 2]")  ->  a Case that calls f([2, 1]), then sorted, and expects [1, 2]

`grpo_ext.rewards.code.values` says which values are equal, and `grpo_ext.rewards.code.constants` which expressions are
constant.
"""

import ast
import contextlib
import marshal
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ext.rewards.code.constants import WRAPPERS, is_literal, literal_value
from grpo_ext.rewards.code.values import decode_scalar, equality_check


@dataclass(frozen=True)
class Case:
    """A call, and the check of its value.

    Args:
        call: the value of "call" in the input of `grpo_ext.rewards.code.guest.run_calls`.
        accepts: whether a value is correct. It takes the value as `json.loads(encode_value(value))`, and raises on
            malformed input.
    """

    call: bytes
    accepts: Callable[[Any], bool]


def returns_any_case(functions: Sequence[str], arguments: list[Any], expected: list[object]) -> Case:
    """The test that a call returns one of the values in `expected`; see `returns_case`."""
    cases = [returns_case(functions, arguments, value) for value in expected]

    def accepts(got: Any) -> bool:
        for case in cases:
            with contextlib.suppress(Exception):  # malformed for this value, but perhaps not for the next
                if case.accepts(got):
                    return True
        return False

    return Case(cases[0].call, accepts)


def returns_case(functions: Sequence[str], arguments: list[Any], expected: object) -> Case:
    """The test that `function(*arguments)` returns `expected`. A list equals a tuple: JSON and Arrow have no tuples.

    Args:
        functions: names, or expressions such as `Solution().solve`. The first one whose leading name the program
            defines is called.
        arguments: plain data.
        expected: plain data.

    Raises:
        ValueError: a function is not such an expression, `arguments` is not a list, or some value is not plain data.
    """
    if not isinstance(arguments, list):
        raise ValueError(f"the arguments of a test must be a list; got {arguments!r}")
    return Case(_encode_call(functions, arguments, {}, ()), equality_check(expected, tuples_are_lists=True))


def assert_case(text: str) -> Case:
    """Parse a test in the form that data sets use: a call with constant arguments, compared with a constant.

    Supported: `assert f(x) == y`, `assert f(x)`, `assert not f(x)`, `assert f(x) is None` (or True, or False),
    `assert math.isclose(f(x), y, rel_tol=z)`, `assert abs(f(x) - y) < z`, and builtins around the call, such as
    `sorted(f(x))`, from `grpo_ext.rewards.code.constants.WRAPPERS`. Any value passes `assert f(x) == f(x)`. A call may
    be that of a method, `Solution().f(x)`. A constant may have arithmetic, such as `1.0 / 3`, `3 * 19` and `"a" + "b"`.

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


def _case_of_condition(condition: ast.expr) -> Case:
    match condition:
        case ast.UnaryOp(op=ast.Not(), operand=call):
            return _case_of_call(call, equality_check(False), ("bool",))
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]) if ast.dump(left) == ast.dump(right):
            return _case_of_call(left, lambda got: True)  # it only has to return
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            call, expected = _call_and_expected(left, right)
            return _case_of_call(call, equality_check(expected))
        case ast.Compare(left=call, ops=[ast.Is()], comparators=[ast.Constant(value=None | True | False as value)]):
            return _case_of_call(call, lambda got: got is value)
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            call, expected = _call_and_expected(left, right)
            return _expect_close(call, expected, rel_tol=0.0, abs_tol=literal_value(bound))
        case ast.Call(
            func=ast.Name(id="isclose") | ast.Attribute(value=ast.Name(id="math"), attr="isclose"),
            args=[left, right],
            keywords=options,
        ):
            call, expected = _call_and_expected(left, right)
            return _expect_close(call, expected, **{str(option.arg): literal_value(option.value) for option in options})
    return _case_of_call(condition, equality_check(True), ("bool",))


def _expect_close(call: ast.expr, expected: Any, **tolerances: Any) -> Case:
    math.isclose(expected, expected, **tolerances)  # raises here if the tolerances are invalid
    return _case_of_call(call, lambda got: math.isclose(decode_scalar(got), expected, **tolerances))


def _case_of_call(node: ast.expr, accepts: Callable[[Any], bool], *wrappers: tuple[Any, ...]) -> Case:
    match node:
        case ast.Call(
            func=ast.Name(id=name),
            args=[inner, *more],
            keywords=[],
        ) if name in WRAPPERS and not is_literal(inner):
            return _case_of_call(inner, accepts, (name, *map(literal_value, more)), *wrappers)
        case ast.Call(func=ast.Name()):
            pass
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(), args=constructor_arguments, keywords=[]))):
            for argument in constructor_arguments:
                literal_value(argument)
        case _:
            raise ValueError(f"{ast.unparse(node)} is not a call of a function by its name, or of a method")
    keywords = {keyword.arg: literal_value(keyword.value) for keyword in node.keywords}
    if None in keywords:
        raise ValueError("** is not a literal argument")
    arguments = list(map(literal_value, node.args))
    return Case(_encode_call([ast.unparse(node.func)], arguments, keywords, wrappers), accepts)


def _encode_call(
    functions: Sequence[str], arguments: list[Any], keywords: dict[str | None, Any], wrappers: tuple[Any, ...]
) -> bytes:
    by_name = {_leading_name(function): function.strip() for function in functions}
    try:
        return marshal.dumps((by_name, arguments, keywords, wrappers))
    except ValueError:
        raise ValueError(f"the arguments are not plain data: {arguments!r}") from None


def _leading_name(function: str) -> str:
    """The name that a program must define to be called, such as "Solution" in "Solution().solve"."""
    node: ast.expr | None = None
    with contextlib.suppress(SyntaxError):
        node = ast.parse(function.strip(), mode="eval").body
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    if not isinstance(node, ast.Name):
        raise ValueError(f"the function must be a name or an expression like 'Solution().solve'; got {function!r}")
    return node.id


def _call_and_expected(left: ast.expr, right: ast.expr) -> tuple[ast.expr, Any]:
    """The call and the expected value, whichever comes first."""
    return (right, literal_value(left)) if is_literal(left) else (left, literal_value(right))
