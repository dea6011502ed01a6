"""Thousands of mutated completions through every reward: no exception, no timeout, no memory leak, one score each.

To test another reward, add a line to REWARDS. Programs run as processes, so `program_reward` gets only every 20th
completion. With THOROUGH=1 in the environment there are 20,000 completions, and it gets all of them, which takes tens
of minutes.
"""

import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_ext.rewards import ProgramReward, coherence_reward, format_reward, length_reward, math_answer_reward
from grpo_ext.rewards.code.sandbox import Limits
from grpo_ext.rewards.logic import logic_problems, logic_reward
from tests.tools.lanes import THOROUGH
from tests.tools.paths import ROOT

EXAMPLES, DIFFERENT = (23_000, 20_000) if THOROUGH else (2_400, 2_000)  # hypothesis generates some texts twice
# CPU time per completion; an expression may take 2 s to parse and 2 s to compare.
SECONDS = 5.0
# Memory that the whole test may add to the process. 117 to 209 MB were observed, most of it used by hypothesis itself:
# without hypothesis, three times as many texts add 22 MB with `math_answer_reward`, less with each thousand, and 3 MB
# with `logic_reward`.
MEGABYTES = 300

# Half of these are numbers, which are compared without sympy.
GOLDS = ["42", r"x^2+1", "1,016", r"2\sqrt{3}", "50%", r"e^{-x^2/2}", "-7.5", r"\mathbb{R}\setminus\{0\}"]
GOLDS += ["3", r"(-\infty,5]", r"\frac{1}{2}", "y=2x+1", "1000", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"]
TASKS = "chain_sum countdown coin_flip number_sorting rubiks_cube rush_hour propositional_logic spiral_matrix".split()
PROBLEMS = [logic_problems(task, train=1, heldout=0)[0][0] for task in TASKS]


class Case(NamedTuple):
    """A reward, the columns for its n-th completion, and how many completions it gets: one in `every`."""

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
# Each program is a process in a sandbox.
if shutil.which("bwrap") or os.environ.get("CI") == "true":
    DOUBLE = {"entry_point": "double", "inputs": [[1], [-3]], "outputs": [2, -6]}
    REWARDS.append(
        Case(
            ProgramReward(limits=Limits(seconds=1.0)),
            lambda n: DOUBLE,
            every=1 if THOROUGH else 20,
        )
    )

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
    r"\boxed{x^2+1}",
    r"\boxed{\frac{\sin x}{2}+\ln(x+1)}",
    r"\boxed{e^{-x^2/2}}",
    r"\boxed{y = 2x+1}",
    r"\boxed{\mathbb{R}\setminus\{0,(1,2)\}}",
    r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
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


def spliced(text: str, edits: list[tuple[int, str]]) -> str:
    """The text with tokens inserted, some of them in place of one or two characters."""
    for place, token in edits:
        place %= len(text) + 1
        text = text[:place] + token + text[place + len(token) % 3 :]
    return text


EDITS = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(TOKENS)), min_size=1, max_size=6)
MUTATED = st.builds(spliced, st.sampled_from(CORPUS), EDITS)


def score(case: Case, number: int, completion: str) -> float | None:
    columns = {key: [value] for key, value in case.columns(number).items()}
    return case.reward([completion], **columns)[0]


def score_seconds(case: Case, number: int, completion: str) -> float:
    """Score one completion, check its score, and return the seconds of CPU time that it took."""
    started = cpu_seconds()
    received = score(case, number, completion)
    seconds = cpu_seconds() - started
    assert received is None or (math.isfinite(received) and 0 <= received <= 1), (case.reward, completion, received)
    return seconds


def cpu_seconds() -> float:
    """CPU time of this process and of its children, the programs, independent of other load on the machine."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def test_mutated_completions():
    """A reward must score any completion quickly: one exception would end a run that has taken hours."""
    before, seen = peak_megabytes(), set()
    slowest = {case.reward.__name__: (0.0, "") for case in REWARDS}

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(MUTATED, MUTATED, MUTATED, st.text()))
    def check(completion: str) -> None:
        for case in (case for case in REWARDS if len(seen) % case.every == 0):
            seconds = score_seconds(case, len(seen), completion)
            slowest[case.reward.__name__] = max(slowest[case.reward.__name__], (seconds, completion))
        seen.add(completion)

    check()
    assert len(seen) >= DIFFERENT
    assert max(slowest.values())[0] < SECONDS, slowest
    assert peak_megabytes() - before < MEGABYTES


SCORES = """
import random
from tests.rewards.test_rewards_fuzz import CORPUS, REWARDS, TOKENS, score, spliced
for number in range({count}):
    rng = random.Random(number)
    edits = [(rng.randrange(100), rng.choice(TOKENS)) for _ in range(rng.randrange(1, 6))]
    completion = spliced(rng.choice(CORPUS), edits)
    print(number, [score(case, number, completion) for case in REWARDS if number % case.every == 0])
"""


def test_scores_are_the_same_in_every_process():
    """The order of sets differs from process to process. A resumed run would score the same completions otherwise."""
    script = SCORES.format(count=2000 if THOROUGH else 200)
    scores = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert len(scores[0]) >= 200
    assert scores[0] == scores[1]


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
def test_a_megabyte_is_scored_quickly(case):
    """A search that starts over at every opening tag takes hours on a megabyte of them."""
    assert max(score_seconds(case, number, text) for number, text in enumerate(HUGE)) < SECONDS
