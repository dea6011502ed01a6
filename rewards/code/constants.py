"""Evaluates the constant expressions in a test, without running the test.

literal_value(ast.parse("[1.0 / 3] * 2", mode="eval").body)  ->  [0.3333333333333333, 0.3333333333333333]
"""

import ast
import builtins
import operator
from collections.abc import Callable
from typing import Any

# Builtins that a test may call in a constant, and wrap around the call that it tests.
WRAPPERS = ("float", "frozenset", "int", "len", "list", "round", "set", "sorted", "str", "tuple")


def literal_value(node: ast.expr) -> Any:
    """The value of a constant expression.

    Raises:
        ValueError, TypeError, ArithmeticError: it is not constant, or cannot be computed.
    """
    match node:
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in WRAPPERS:
            return getattr(builtins, name)(*map(literal_value, arguments))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            return _computed(_ARITHMETIC[type(sign)], literal_value(left), literal_value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -literal_value(operand)
        case ast.List(elts=items):
            return list(map(literal_value, items))
        case ast.Tuple(elts=items):
            return tuple(map(literal_value, items))
        case ast.Set(elts=items):
            return set(map(literal_value, items))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {literal_value(key): literal_value(value) for key, value in zip(keys, values, strict=True) if key}
    return ast.literal_eval(node)


def is_literal(node: ast.expr) -> bool:
    """Whether `literal_value` can evaluate an expression."""
    try:
        literal_value(node)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True


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
