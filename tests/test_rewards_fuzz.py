"""Twenty thousand mutated completions through every reward: no exception, no answer over its time, no memory eaten.

To put another reward to this test, add a line to REWARDS.
"""

import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import ProgramReward, coherence_reward, format_reward, length_reward, math_answer_reward
from rewards.logic import logic_problems, logic_reward
from rewards.sandbox import Limits

EXAMPLES, BATCH = 200, 100
SECONDS = 5.0  # for one completion; a comparison of expressions may take 2 s to read and 2 s to compare
MEGABYTES = 200  # that a whole run may add to the process

# Three in four are numbers, as in most data sets: those are judged without sympy.
GOLDS = ["42", "1,016", r"\frac{1}{2}", "50%", "-7.5", "1000", "0", "3", "x^2+1", r"2\sqrt{3}", r"(-\infty,5]", "x=5"]
TASKS = "chain_sum countdown coin_flip number_sorting rubiks_cube rush_hour propositional_logic spiral_matrix".split()
PROBLEMS = [logic_problems(task, train=1, heldout=0)[0][0] for task in TASKS]


class Case(NamedTuple):
    """A reward, the columns for its n-th completion, and how many completions go by for one that it judges."""

    reward: Callable[..., list[float | None]]
    columns: Callable[[int], dict[str, Any]]
    every: int = 1


REWARDS = [
    Case(format_reward, lambda n: {}),
    Case(length_reward, lambda n: {}),
    Case(coherence_reward, lambda n: {}),
    Case(math_answer_reward, lambda n: {"answer": GOLDS[n % len(GOLDS)], "prompts": "Simplify x^2+1 and 6/8."}),
    Case(logic_reward, lambda n: {key: PROBLEMS[n % len(PROBLEMS)][key] for key in ("answer", "task", "metadata")}),
]
# Each of its programs is a process in a sandbox.
if shutil.which("bwrap") or os.environ.get("CI") == "true":
    DOUBLE = {"entry_point": "double", "inputs": [[1], [-3]], "outputs": [2, -6]}
    REWARDS.append(Case(ProgramReward(limits=Limits(seconds=1.0)), lambda n: DOUBLE, every=40))

CORPUS = [
    r"We get $6 \cdot 7 = 42$, so \boxed{42}.",
    r"\boxed{\frac{1}{2}} or \boxed{\{x^2+1, (2\sqrt{3}, [1,2))\}}",
    "<think>6*7, that is 42 {</think>\n<answer>42</answer>",
    "8+8+0=16 3+7+1=11 #### $1,016.50",
    "The answer is 5 km. 答案是：五十个。因为下雨，所以带伞，然而忘了。",
    r"\boxed{x = \pm 2 \text{ or } -\infty < y \le 50\%}",
    '<answer>[1, 2, "B U2 R\'", (A ∧ B)]</answer>',
    "<answer>F+1 K-2 7*(6-0)/1</answer>",
    "```python\ndef double(x):\n    return 2 * x\n```",
    "42",
    "",
]
TOKENS = [
    *"0123456789{}()[]<>|\\^_=+-*/!,.;:%$#&~'\"",
    *(
        "\n",
        " ",
        "\x00",
        "\u202e",
        "\u200b",
        "\ud800",
        "\U0001f642",
        "٤",
        "－",
        "９",
        "√",
        "²",
        "½",
        "是",
        "e999999999",
    ),
    *(r"\boxed{", r"\frac{", r"\sqrt{", r"\text{", r"\left(", r"\begin{pmatrix}", r"\binom{", r"\sum", r"\pi", r"\cup"),
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "#### ",
        "answer is ",
        "^{9^{9^9}}",
        "(10^9)!",
        "((((",
        "9" * 300,
    ),
    *(" or ", " million", "nan", "**", "R99999999", "因为", "eval(", "__import__('os')"),
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A text of the corpus with up to eight tokens put in, and pieces cut out or doubled."""
    text = draw(st.sampled_from(CORPUS))
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, max(0, len(text))))
        kind = draw(st.sampled_from(["put", "put", "put", "cut", "double"]))
        if kind == "put":
            text = text[:start] + draw(st.sampled_from(TOKENS)) + text[start:]
        else:
            end = start + draw(st.integers(1, 12))
            text = text[:start] + (text[start:end] * 2 if kind == "double" else "") + text[end:]
    return text


def judged(case: Case, number: int, completion: str) -> float:
    """The seconds that one completion takes, after a look at its score."""
    columns = {key: [value] for key, value in case.columns(number).items()}
    started = time.monotonic()
    (score,) = case.reward([completion], **columns)
    seconds = time.monotonic() - started
    assert score is None or (math.isfinite(score) and 0 <= score <= 1), (case.reward, completion, score)
    return seconds


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def test_mutated_completions():
    """Whatever stands in a completion, a reward gives a score, soon: one exception would end a run of hours."""
    before, count = peak_megabytes(), 0
    slowest = {case.reward.__name__: (0.0, "") for case in REWARDS}

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(st.one_of(mutated(), mutated(), mutated(), st.text()), min_size=BATCH, max_size=BATCH))
    def check(batch: list[str]) -> None:
        nonlocal count
        for completion in batch:
            for case in (case for case in REWARDS if count % case.every == 0):
                seconds = judged(case, count, completion)
                slowest[case.reward.__name__] = max(slowest[case.reward.__name__], (seconds, completion))
            count += 1

    check()
    assert count >= EXAMPLES * BATCH
    assert max(slowest.values())[0] < SECONDS, slowest
    assert peak_megabytes() - before < MEGABYTES


HUGE = [
    "9" * 1_000_000,
    "因为" * 300_000,
    "<think>" * 100_000 + "</think>" * 100_000,
    "<answer>" * 100_000 + "42" + "</answer>" * 100_000,
    r"\boxed{" * 100_000 + "42" + "}" * 100_000,
    "word " * 200_000,
    "(" * 500_000 + ")" * 500_000,
    "\n" * 1_000_000,
    "\x00" * 1_000_000,
    "\U0001f642" * 250_000,
    "#### 1,016\n" * 90_000,
    "答案是 42。" * 100_000,
]


@pytest.mark.parametrize("case", REWARDS, ids=lambda case: case.reward.__name__)
def test_a_megabyte_is_judged_at_once(case):
    """A search that begins anew at every opening tag takes hours on a megabyte of them."""
    assert max(judged(case, number, text) for number, text in enumerate(HUGE)) < SECONDS
