r"""Parses expressions, matrices and sets in LaTeX, and compares them within bounded time.

    expressions_match("(x+1)^2", "x^2+2x+1")  ->  True

Math-Verify compares with sympy's `simplify` and `solve`, whose run time has no bound. Here two expressions are equal if
their values agree at fixed pseudo-random points, to 30 digits beyond those of the numbers in them. So a difference of 1
shows however large the numbers are, and no rounded number passes. Piecewise functions and roots, which may hide one
(`\sqrt{(x-5)^2}` is `|x-5|`), are compared at more points, on both sides of their breaks. Only sets are compared by
Math-Verify.

Frequent expressions are read by `grpo_ext.rewards.math.plain_expression`, all others by Math-Verify. Some input is
rejected before it is parsed: expressions that can grow without bound (towers of powers, factorials of large numbers)
and those that would have to be computed (integrals, sums, limits). The time limit works only in the main thread, but is
therefore rarely needed.
"""

import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from itertools import islice
from typing import TypeAlias

import mpmath
import sympy
from antlr4 import PredictionContextCache
from antlr4.dfa.DFA import DFA
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.antlr_parser import PSParser
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef

from grpo_ext.rewards.math.plain_expression import parse_plain_expression
from grpo_ext.rewards.workers.deadline import DeadlineExceeded, run_with_deadline

Expression: TypeAlias = sympy.Basic | sympy.MatrixBase

# Time limit in the main thread, for parsing and again for comparing. Both usually take milliseconds.
TIME_LIMIT_SECONDS = 2.0
MAX_BITS = 2**14  # of any number that can occur while an expression is evaluated
MAX_PARSER_STATES = 20_000  # cached by Math-Verify's parser; ordinary answers need about 2,000

_SUPPORTED_COMMANDS = (
    "frac|sqrt|cdot|times|div|infty|pi|circ|cup|cap|setminus|in|mathbb|emptyset|binom|vec|overline|bar|hat|prime|top|"
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|lfloor|rfloor|lceil|rceil|"
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|"
    "omega|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[pb]?matrix\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_UNSUPPORTED = re.compile(
    rf"\\(?!(?:{_SUPPORTED_COMMANDS})(?![A-Za-z]))[A-Za-z]"
    # arguments that sympy evaluates while it parses
    r"|\\binom(?!\s*\{\s*(?:\w{1,2}|[a-z]\s*[+-]\s*\d)\s*\}\s*\{\s*\w{1,2}\s*\})|\\sqrt\s*\[(?!\s*(?:\d{1,2}|[a-z])\s*\])"
)
# Math-Verify would parse a word as a product of letters, and 5 6 as a sum.
_NOT_AN_EXPRESSION = re.compile(r"[A-Za-z]{4}|(?<![_\d])\d+\s+\d|\d\.\d*\.|[^\x20-\x7e]|[<>=]")
_SET = re.compile(r",|\\(?:cup|cap|setminus|mathbb|emptyset|in)(?![A-Za-z])")
_SMALL_POWER = re.compile(r"\^\s*(?:\d(?!\d)|[A-Za-z]|\{\s*(?:\d{1,2}|[A-Za-z])\s*\})")

_PIECEWISE = (sympy.floor, sympy.ceiling, sympy.Abs, sympy.sign, sympy.Max, sympy.Min, sympy.Mod)

_EXTRACTION = [
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        # Its unit removal would turn 5c into 5.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    )
]


def expressions_match(gold: str, answer: str) -> bool:
    """Whether two normalized texts are the same expression, matrix or set; False if either cannot be parsed."""
    left, right = parse_expression(gold), parse_expression(answer)
    return left is not None and right is not None and _compare_within_deadline(lambda: _are_equal(left, right))


def relations_match(gold: tuple[str, str, str], answer: tuple[str, str, str]) -> bool:
    r"""Whether two relations are the same up to a constant factor: 2x+4y = 6 is x+2y = 3.

    Args:
        gold: (left side, sign, right side) with the sign `=`, `\ne`, `<` or `\le`. Swap the sides of `>` and `\ge`.
        answer: the relation to compare, in the same form.
    """
    sides = [parse_expression(text) for text in (gold[0], gold[2], answer[0], answer[2])]
    if gold[1] != answer[1] or not all(isinstance(side, sympy.Expr) for side in sides):
        return False

    def compare() -> bool:
        digits = _digits(sides)
        factors = []
        for left, right, other, other_right in _values_at_points(sides, digits):
            with mpmath.workdps(digits):
                difference = left - right
                if abs(difference) > 1e-15:
                    factors.append((other - other_right) / difference)
            if factors and not _agree(factors[-1], factors[0], digits):
                return False
        either_sign = gold[1] in ("=", r"\ne")
        return len(factors) > 1 and (abs(factors[0]) if either_sign else factors[0].real) > 1e-15

    return _compare_within_deadline(compare)


def _cached_if_in_time(parse: Callable[[str], Expression | None]) -> Callable[[str], Expression | None]:
    """Cache the function, since the completions of a group share their gold answer. It returns None on
    DeadlineExceeded, which is not cached: on a busy machine the next attempt may be in time."""
    cached = lru_cache(maxsize=4096)(parse)

    @wraps(parse)
    def parse_in_time(text: str) -> Expression | None:
        try:
            return cached(text)
        except DeadlineExceeded:
            return None

    vars(parse_in_time)["cache_clear"] = cached.cache_clear
    return parse_in_time


@_cached_if_in_time
def parse_expression(text: str) -> Expression | None:
    """The expression, matrix or set that a text states, unevaluated; None if it cannot be parsed or is too large.

    Args:
        text: normalized, and short with shallow brackets: `grpo_ext.rewards.math.answer` checks that.
    """
    if not _is_safe_to_parse(text):
        return None
    # Decimals become exact fractions. 2(3) becomes a product: Math-Verify takes it for a mixed number, 2+3.
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", text)
    text = re.sub(r"(?<![_\d])(\d+)\s*\(", r"\1\\cdot(", text)
    text = re.sub(r"\^\{(\w)\}(?=\s*(?:[-+)}]|$))", r"^\1", text)  # the parser is faster without braces
    if re.search(r"[A-DF-HJ-Za-df-z]", _COMMAND.sub("", text)):
        text = text.replace("I", r"\iota ")  # a variable in V = IR, unlike in 3+4I
    plain = parse_plain_expression(text)
    if plain is not None:
        return plain if _magnitude_bits(plain) <= MAX_BITS else None
    if len(PSParser.sharedContextCache.cache) > MAX_PARSER_STATES:  # the parser never evicts any
        PSParser.sharedContextCache = PredictionContextCache()
        PSParser.decisionsToDFA = [DFA(state, number) for number, state in enumerate(PSParser.atn.decisionToState)]

    def parse_boxed() -> list[Expression]:
        return parse(rf"\boxed{{{text}}}", _EXTRACTION, "no_fallback", parsing_timeout=None)

    try:
        (expression,) = run_with_deadline(TIME_LIMIT_SECONDS, parse_boxed)
        usable = isinstance(expression, Expression) and not expression.has(sympy.nan, sympy.zoo)
        return expression if usable and _magnitude_bits(expression) <= MAX_BITS else None
    except Exception:  # model-written text can make sympy raise anything
        return None


def _is_safe_to_parse(text: str) -> bool:
    """Whether sympy has nothing to compute while it parses this text."""
    bare = _MATRIX.sub("#", text)
    return (
        not _UNSUPPORTED.search(bare)
        and not _NOT_AN_EXPRESSION.search(_COMMAND.sub("#", bare))
        and not (_SET.search(text) and re.search(r"\^|!", text))  # the ends of intervals are evaluated
        and all(_is_small_exponent(text[power.end() :]) for power in re.finditer(r"\^\s*", text))
    )


def _is_small_exponent(rest: str) -> bool:
    """Whether the exponent at the start of `rest` contains at most two powers, all small, unlike in 9^{9^{9^9}}."""
    depth, end = 0, 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        end = place
        if depth <= 0:
            break
    inside, after = rest[: end + 1], rest[end + 1 :]
    powers = inside.count("^")
    if "!" in inside or re.match(r"\s*\^", after):
        return False
    return powers <= 2 and powers == len(_SMALL_POWER.findall(inside))


def _magnitude_bits(expression: Expression) -> float:
    """Approximate log2 of the largest number that evaluation can reach. Values substituted for symbols are below 3."""
    if isinstance(expression, sympy.MatrixBase):
        return max(map(_magnitude_bits, expression.flat()), default=0)
    if isinstance(expression, sympy.Rational):
        return math.log2(max(abs(expression.p), expression.q))
    if isinstance(expression, sympy.Pow):
        return max(_magnitude_bits(expression.base), 1) * 2 ** min(_exponent_bits(expression.exp), 64)
    if isinstance(expression, sympy.exp | sympy.factorial):
        return max(size := _exponent_bits(expression.args[0]), 1.5) * 2 ** min(size, 64)
    inside = [_magnitude_bits(argument) for argument in expression.args] or [1.6]
    return sum(inside) if isinstance(expression, sympy.Mul) else max(inside) + math.log2(len(inside))


def _exponent_bits(exponent: Expression) -> float:
    """log2 of the largest value of an exponent, to which a denominator adds nothing."""
    if isinstance(exponent, sympy.Rational):
        return math.log2(max(abs(exponent.p) / exponent.q, 1))
    if isinstance(exponent, sympy.Mul):
        return sum(map(_exponent_bits, exponent.args))
    if isinstance(exponent, sympy.Pow) and exponent.exp == -1 and isinstance(exponent.base, sympy.Integer):
        return 0.0
    if isinstance(exponent, sympy.Add):
        return max(map(_exponent_bits, exponent.args)) + math.log2(len(exponent.args))
    return _magnitude_bits(exponent)


def _are_equal(gold: Expression, answer: Expression) -> bool:
    if gold == answer:
        return True
    if isinstance(gold, sympy.MatrixBase | sympy.MatrixExpr):
        gold, answer = gold.doit(), answer.doit()
        if not isinstance(answer, sympy.MatrixBase) or gold.shape != answer.shape:
            return False
        return all(_are_equal(*entries) for entries in zip(gold.flat(), answer.flat(), strict=True))
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        few, digits = 20, _digits([gold, answer])
        if digits > 4 * few and any(_differ(*row) for row in islice(_values_at_points([gold, answer], few), 1)):
            return False
        agreeing = 0
        for left, right in _values_at_points([gold, answer], digits):
            if not _agree(left, right, digits):
                return False
            agreeing += 1
        return agreeing > 0
    return bool(verify([gold], [answer], timeout_seconds=None))


def _compare_within_deadline(compare: Callable[[], bool]) -> bool:
    try:
        return run_with_deadline(TIME_LIMIT_SECONDS, compare)
    except (Exception, DeadlineExceeded):  # an answer that cannot be compared is wrong
        return False


def _digits(expressions: Sequence[sympy.Expr]) -> int:
    """The number of decimal digits to compare: 50 more than the numbers in the expressions have."""
    return 50 + int(2 * max(map(_magnitude_bits, expressions)) * math.log10(2))


def _agree(left: mpmath.mpc, right: mpmath.mpc, digits: int) -> bool:
    """Whether two values agree to all but the last 20 digits, which are left to rounding."""
    with mpmath.workdps(digits):
        size = max(abs(left), abs(right), mpmath.mpf(10) ** -digits)
        return bool(abs(left - right) <= mpmath.mpf(10) ** (20 - digits) * size)


def _differ(left: mpmath.mpc, right: mpmath.mpc) -> bool:
    """Whether two values differ by far more than what rounding to a few digits can explain."""
    return bool(abs(left - right) > 1e-6 * max(abs(left), abs(right), 1))


def _points(expressions: Sequence[sympy.Expr], names: Sequence[str]) -> Iterator[dict[str, sympy.Rational]]:
    """Fixed pseudo-random values of the symbols: within 3 of zero, and beyond all breaks, which roots may have too."""
    for trial in range(8):
        rng = random.Random(trial)
        signs = (1, -1) if trial % 2 else (1, 1)
        yield {name: sympy.Rational(rng.randrange(20, 300) * rng.choice(signs), 101) for name in names}
    is_piecewise = any(e.has(*_PIECEWISE) for e in expressions)
    has_root = any(_is_root(power) for e in expressions for power in e.atoms(sympy.Pow))
    if not is_piecewise and not has_root:
        return
    numbers = {abs(part) for e in expressions for number in e.atoms(sympy.Rational) for part in (number.p, number.q)}
    reach = int(min(max(numbers, default=1), 1000)) * 2 + 5
    for trial in range(24):
        rng = random.Random(100 + trial)
        scale = 1 if is_piecewise and trial % 3 else 7  # integers, at which (x-9)/(sqrt(x)-3) is 0/0, and fractions
        limit = reach if trial % 2 else min(reach, 25)
        tops = {name: rng.randrange(-limit * scale, limit * scale + 1) for name in names}
        yield {name: sympy.Rational(top + (not is_piecewise and top % 7 == 0), scale) for name, top in tops.items()}


def _is_root(power: sympy.Pow) -> bool:
    return bool(power.base.free_symbols) and power.exp.is_number and not power.exp.is_integer


def _values_at_points(expressions: Sequence[sympy.Expr], digits: int) -> Iterator[list[mpmath.mpc]]:
    """The values of all expressions, one row per point, so that the first difference can end a comparison.

    Points with a value that is not finite are dropped. So are points with a complex value, unless hardly any points
    would remain, or an expression is piecewise: then |x| and x differ by their domains as well.
    """
    expressions = [e.xreplace({f: sympy.Symbol(str(f)) for f in e.atoms(AppliedUndef)}) for e in expressions]
    names = sorted({symbol.name for e in expressions for symbol in e.free_symbols} - {"i"})
    keep_complex = any(e.has(*_PIECEWISE) for e in expressions)
    kept, complex_rows = 0, []
    for point in _points(expressions, names) if names else ({},):
        point = point | {"i": sympy.I}
        values = [
            e.evalf(digits, subs={symbol: point[symbol.name] for symbol in e.free_symbols}, maxn=2 * digits + 100)
            for e in expressions
        ]
        with mpmath.workdps(digits):
            row = [mpmath.mpc(*(part._to_mpmath(mpmath.mp.prec) for part in value.as_real_imag())) for value in values]
        if not all(map(mpmath.isfinite, row)):
            continue
        if keep_complex or all(abs(value.imag) <= 1e-15 * abs(value.real) for value in row):
            kept += 1
            yield row
        else:
            complex_rows.append(row)
    if kept < min(2, kept + len(complex_rows)):
        yield from complex_rows


# Math-Verify warns that its own time limit is off. `run_with_deadline` replaces it.
logging.getLogger("math_verify").setLevel(logging.ERROR)
