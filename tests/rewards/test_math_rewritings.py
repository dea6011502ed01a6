"""Gold answers rewritten: other notation for the same value scores 1.0, another value 0.0.

A table has only the cases that somebody thought of. Here every rewriting is applied to every gold answer that it fits.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_ext.rewards import math_answer_reward
from grpo_ext.rewards.math.final_answer import extract_final_answer
from tests.rewards.test_math_answer import CASES, RIGHT

GSM8K = [
    line
    for line in Path(__file__).with_name("gsm8k_golds.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
TABLE = sorted({extract_final_answer(gold) or gold for _, gold, reward in CASES if reward == RIGHT and gold.strip()})
EXPRESSIONS = [
    r"\frac{3}{7}", r"2\sqrt{3}", r"\frac{\sqrt{5}}{12}", r"x^2+3x+2", r"\frac{x+4}{x-9}", r"3\pi+2", r"e^{2x}-1",
    r"2^{100}-1", r"\sin(2x)+1",
    r"\frac{3}{2}x^{2}y^{3}", r"(2,-3)", r"(-\infty,4]", r"(1,2)\cup(3,\infty)", r"\{2,3,7\}",
    r"y=3x+2", r"x^2+y^2=25", r"x>4", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\sqrt{2}+\sqrt{3}", r"\log_2(5)+1",
    r"-\frac{7}{128}", r"0.125", r"101_2", r"7:11", r"15\%", r"5 \pmod{7}", r"25!", r"|x-5|", r"\lfloor n/4\rfloor",
]  # fmt: skip


# name -> the rewritten answer, the same text if it does not fit
NOTATION: dict[str, Callable[[str], str]] = {
    "dollars": lambda s: f"${s}$" if "$" not in s else s,
    "parentheses": lambda s: rf"\({s}\)" if "$" not in s else s,
    "display": lambda s: rf"\displaystyle {s}",
    "braces": lambda s: f"{{{s}}}",
    "spaces": lambda s: f"  {s} ",
    "line breaks": lambda s: f"\n{s}\n",
    "full stop": lambda s: f"{s}.",
    "thin space behind": lambda s: rf"{s}\,",
    "bold": lambda s: f"**{s}**",
    "dfrac": lambda s: s.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda s: s.replace(r"\frac", r"\tfrac"),
    "fractions of digits without braces": lambda s: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", s),
    "over": lambda s: re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"{\1 \\over \2}", s),
    "roots without braces": lambda s: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", s),
    "powers without braces": lambda s: re.sub(r"\^\{(\w)\}", r"^\1", s),
    "powers with braces": lambda s: re.sub(r"\^(\w)(?!\w)", r"^{\1}", s),
    "left and right": lambda s: (
        rf"\left{s[0]}{s[1:-1]}\right{s[-1]}" if re.fullmatch(r"[(\[][^()\[\]]*[)\]]", s) else s
    ),
    "full-width digits": lambda s: re.sub(r"\d", lambda d: chr(ord(d.group()) + 0xFEE0), s),
    "Unicode minus": lambda s: s.replace("-", "−"),
    "Unicode pi": lambda s: re.sub(r"\\pi(?![A-Za-z])\s*", "π", s),
    "Unicode infinity": lambda s: re.sub(r"\\infty(?![A-Za-z])\s*", "∞", s),
}
# the same, of numbers
NUMBERS: dict[str, Callable[[str], str]] = {
    "x =": lambda s: f"x = {s}",
    "decimals": lambda s: f"{s}.00" if re.fullmatch(r"-?\d+", s) else s,
    "leading plus": lambda s: f"+{s}" if s[0] != "-" else s,
    "thousands": lambda s: f"{int(s):,}" if re.fullmatch(r"-?\d+", s) else s,
    "thousands with LaTeX commas": lambda s: f"{int(s):,}".replace(",", "{,}") if re.fullmatch(r"-?\d+", s) else s,
    "thousands with thin spaces": lambda s: f"{int(s):,}".replace(",", r"\,") if re.fullmatch(r"-?\d+", s) else s,
    "no thousands": lambda s: s.replace(",", ""),
    "a unit": lambda s: rf"{s} \text{{ apples}}",
    "a unit as a word": lambda s: f"{s} apples",
    "dollars in front": lambda s: rf"\${s}" if s[0] != "-" else s,
    "a fraction of one": lambda s: rf"\frac{{{s}}}{{1}}" if re.fullmatch(r"-?\d+", s) else s,
    "scientific": lambda s: rf"{s} \times 10^{{0}}" if re.fullmatch(r"-?\d+", s) else s,
    "percent": lambda s: f"{int(s) * 100}%" if re.fullmatch(r"\d+", s) else s,
}
MUTATIONS: dict[str, Callable[[str], str]] = {
    "first digit": lambda s: re.sub(r"\d", lambda d: str((int(d.group()) + 1) % 10), s, count=1),
    "last digit": lambda s: re.sub(r"\d(?=\D*$)", lambda d: str((int(d.group()) + 1) % 10), s),
    "one more digit": lambda s: re.sub(r"\d(?=\D*$)", lambda d: d.group() + "7", s),
    "one more": lambda s: f"{s}+1",
    "one candidate more": lambda s: f"{s} or 987",
}
NUMBER_MUTATIONS: dict[str, Callable[[str], str]] = {
    "sign": lambda s: f"-{s}" if s[0] != "-" else s[1:],
    "ten times": lambda s: f"{s}0",
    "a tenth": lambda s: f"0.{s}",
    "nearly": lambda s: f"{s}.0001" if "." not in s else f"{s}1",
    "thousands": lambda s: f"{s} thousand",
    "squared": lambda s: f"{s}^2" if s not in ("0", "1") else s,
}


def scores(golds: list[str], change: Callable[[str], str]) -> dict[tuple[str, str], float | None]:
    changed = {gold: change(gold) for gold in golds}
    return {
        (gold, text): math_answer_reward([rf"so it is \boxed{{{text}}}"], answer=[gold])[0]
        for gold, text in changed.items()
        if text != gold
    }


@pytest.mark.parametrize("name", NOTATION)
def test_other_notation_is_right(name):
    found = scores([*GSM8K, *EXPRESSIONS, *TABLE], NOTATION[name])
    assert {case: score for case, score in found.items() if score != 1.0} == {}


@pytest.mark.parametrize("name", NUMBERS)
def test_other_notation_of_a_number_is_right(name):
    found = scores(GSM8K, NUMBERS[name])
    assert found
    assert {case: score for case, score in found.items() if score != 1.0} == {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_value_is_wrong(name):
    found = scores([*GSM8K, *EXPRESSIONS], MUTATIONS[name])
    assert found
    assert {case: score for case, score in found.items() if score != 0.0} == {}


@pytest.mark.parametrize("name", NUMBER_MUTATIONS)
def test_another_number_is_wrong(name):
    found = scores(GSM8K, NUMBER_MUTATIONS[name])
    assert {case: score for case, score in found.items() if score != 0.0} == {}
