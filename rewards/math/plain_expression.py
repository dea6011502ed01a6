r"""Reads frequent expressions: numbers, letters, brackets, sums, products, fractions, powers and roots.

    parse_plain_expression(r"2x^{2}-\frac{1}{3}")  ->  2*x**2 - 1/3

Math-Verify reads these too, but more slowly. Whatever could have a second meaning, such as `f(x)`, `1/2x` or the mixed
number `2\frac{1}{3}`, is left to it. Nothing is evaluated, so the size of the numbers does not matter.
"""

import re

import sympy

from grpo_ext.rewards.math.cursor import Cursor

_TOKEN = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div)(?![A-Za-z])|\d+|[A-Za-z(){}\[\]+*/^-]| +")
_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3}|d[A-Za-z]|[A-Za-z]d)", re.IGNORECASE)  # or the differential dx
_PRODUCT_SIGNS = {"*", r"\cdot", r"\times"}
_QUOTIENT_SIGNS = {"/", r"\div"}
_FUNCTION_NAMES = set("fghFGH")
_CONSTANTS = {r"\pi": sympy.pi, "e": sympy.E, "I": sympy.I}


class _NotPlainError(Exception):
    pass


def parse_plain_expression(text: str) -> sympy.Expr | None:
    """The unevaluated expression that a text states, or None if it has any other notation.

    Args:
        text: normalized, without decimals, and with shallow brackets.
    """
    tokens = _TOKEN.findall(text)
    if sum(map(len, tokens)) != len(text) or _WORD.search(text):
        return None
    reader = _Reader([token for token in tokens if token[0] != " "])
    try:
        expression = reader.read_sum()
    except _NotPlainError:
        return None
    return None if reader.peek() else expression


class _Reader(Cursor):
    """A cursor over the tokens of an expression, with a method for each level of precedence."""

    def expect(self, token: str) -> None:
        if self.next() != token:
            raise _NotPlainError

    def read_sum(self) -> sympy.Expr:
        terms = [self.read_term()]
        while self.peek() in ("+", "-"):
            terms.append(self.read_term())
        return terms[0] if len(terms) == 1 else sympy.Add(*terms, evaluate=False)

    def read_term(self) -> sympy.Expr:
        """A product with its sign."""
        is_negative = False
        if self.peek() in ("+", "-"):
            is_negative = self.next() == "-"
        factors = [self.read_power()]
        while True:
            token = self.peek()
            if token in _PRODUCT_SIGNS:
                self.next()
                factors.append(self.read_power())
            elif token in _QUOTIENT_SIGNS:
                self.next()
                factors.append(_inverse(self.read_power()))
                if self.peek() not in ("", "+", "-", ")", "}", *_PRODUCT_SIGNS):
                    raise _NotPlainError  # 1/2x
            elif token == "(" or token.isalpha() or token in (r"\sqrt", r"\frac", r"\pi"):
                before = self.tokens[self.place - 1]
                if (token == "(" and before.isalpha()) or (token == r"\frac" and before.isdigit()):
                    raise _NotPlainError  # f(x), or a mixed number
                factors.append(self.read_power())
            else:
                break
        if is_negative:
            factors[0] = -factors[0] if factors[0].is_Integer else sympy.Mul(-1, factors[0], evaluate=False)
        return factors[0] if len(factors) == 1 else sympy.Mul(*factors, evaluate=False)

    def read_power(self) -> sympy.Expr:
        base_token = self.peek()
        base = self.read_atom()
        if self.peek() != "^":
            return base
        self.next()
        exponent = self.read_group() if self.peek() == "{" else self.read_digit_or_letter()
        if self.peek() == "^" or (self.peek() == "(" and base_token in _FUNCTION_NAMES):
            raise _NotPlainError
        return sympy.exp(exponent, evaluate=False) if base == sympy.E else sympy.Pow(base, exponent, evaluate=False)

    def read_atom(self) -> sympy.Expr:
        token = self.next()
        if token.isdigit():
            return sympy.Integer(int(token))
        if token == "(":
            inside = self.read_sum()
            self.expect(")")
            return inside
        if token == r"\frac":
            top, bottom = self.read_group(), self.read_group()
            return _quotient(top, bottom)
        if token == r"\sqrt":
            root = 2
            if self.peek() == "[":
                self.next()
                root = self.read_root()
                self.expect("]")
            return sympy.Pow(self.read_group(), sympy.Rational(1, root), evaluate=False)
        return _symbol(token)

    def read_group(self) -> sympy.Expr:
        self.expect("{")
        inside = self.read_sum()
        self.expect("}")
        return inside

    def read_root(self) -> int:
        token = self.next()
        if not token.isdigit() or int(token) == 0:
            raise _NotPlainError
        return int(token)

    def read_digit_or_letter(self) -> sympy.Expr:
        token = self.next()
        return sympy.Integer(int(token)) if token.isdigit() and len(token) == 1 else _symbol(token)


def _symbol(token: str) -> sympy.Expr:
    if token in _CONSTANTS:
        return _CONSTANTS[token]
    if len(token) != 1 or not token.isalpha():
        raise _NotPlainError
    return sympy.Symbol(token.lower(), real=token != "i")


def _inverse(expression: sympy.Expr) -> sympy.Expr:
    if expression.is_zero:
        raise _NotPlainError
    return sympy.Pow(expression, -1, evaluate=False)


def _quotient(top: sympy.Expr, bottom: sympy.Expr) -> sympy.Expr:
    if top.is_Integer and bottom.is_Integer and bottom != 0:
        return sympy.Rational(top, bottom)
    return sympy.Mul(top, _inverse(bottom), evaluate=False)
