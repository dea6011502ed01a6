"""The reader of frequent expressions, with Math-Verify's parser as its oracle."""

import random

import pytest
import sympy
from latex2sympy2_extended import latex2sympy

from grpo_ext.rewards.math.plain_expression import parse_plain_expression
from tests.tools.lanes import THOROUGH

OPERANDS = ["x", "y", "2", "10", "(x+1)", "(y-2)", r"\pi", r"\frac{1}{2}", r"\frac{x}{y+1}", r"\sqrt{x}", "-3"]
OPERANDS += [r"\sqrt[3]{2}", "e", "ab", "3x", "x^{2}", "(x+1)^{2}", "e^{x}", "2^{n}", "x^{-1}", "x^{a+b}"]
OPERATORS = ["+", "-", "*", r"\cdot ", "/", "", " ", "^2", "^{2}", " + "]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    text = rng.choice(OPERANDS)
    for _ in range(rng.randrange(1, 4)):
        operator = rng.choice(OPERATORS)
        text += operator if operator.startswith("^") else operator + rng.choice(OPERANDS)
    return text


def value(expression: sympy.Expr) -> complex:
    values = {"x": 0.7, "y": 5.2, "a": 1.3, "b": -0.4, "n": 3.1}
    return complex(expression.subs({symbol: values[symbol.name] for symbol in expression.free_symbols}).evalf())


def test_it_reads_what_math_verify_reads():
    """A wrong precedence would pay for wrong answers, and no answer would be without a score to show it."""
    read = 0
    for seed in range(3000 if THOROUGH else 150):
        text = random_text(seed)
        expression = parse_plain_expression(text)
        if expression is not None:
            read += 1
            assert value(expression) == pytest.approx(value(latex2sympy(text))), text
    assert read > 50


AMBIGUOUS = ["f(x)", "f^{-1}(x)", "1/2x", r"2\frac{1}{3}", "dx", "abc", "{x}"]
UNKNOWN = ["|x|", r"\sin x", "x_{1}", "1,2", "x!", r"\theta"]
MALFORMED = ["x^2^3", "(x", "x+", "", "2 3", r"\frac{1}{0}", r"\sqrt[0]{2}"]


@pytest.mark.parametrize("text", [*AMBIGUOUS, *UNKNOWN, *MALFORMED])
def test_it_leaves_the_rest_to_math_verify(text):
    """These have a second meaning or none, or need more than this reader knows."""
    assert parse_plain_expression(text) is None
