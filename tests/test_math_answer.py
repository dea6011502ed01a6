"""The math reward as one table: what a model may write, the gold answer, and what it earns."""

import subprocess
import sys
import threading
import time

import pytest

from rewards import math_answer_reward
from rewards.math_answer import MAX_ANSWER_CHARACTERS, final_answer

RIGHT, WRONG, UNJUDGED = 1.0, 0.0, None

CASES = [
    # markers
    (r"so it is \boxed{42}", "42", RIGHT),
    (r"\boxed{41}, no: \boxed{42}", "42", RIGHT),
    (r"\boxed{42}, no: \boxed{41}", "42", WRONG),
    (r"\boxed{\frac{1}{2}}", "0.5", RIGHT),
    (r"\boxed{42} and then \boxed{4", "42", RIGHT),  # the last one was cut off
    ("<answer>42</answer>", "42", RIGHT),
    ("<answer>\n42\n</answer>", "42", RIGHT),
    ("8+8+0=16 #### 1016", "1016", RIGHT),
    ("8+8+0=16 #### 1013", "1016", WRONG),
    ("#### 1\n#### 2", "2", RIGHT),
    ("The answer is 42.", "42", RIGHT),
    ("The final answer is: 3.14. I am sure.", "3.14", RIGHT),
    ("答案是 42。", "42", RIGHT),
    ("答案为：42", "42", RIGHT),
    ("42", "42", RIGHT),
    (" -7.50 ", "-7.5", RIGHT),
    (r"#### 1, but \boxed{2}", "2", RIGHT),  # boxed comes first
    # no final answer
    ("I think 42 or so", "42", WRONG),
    ("", "42", WRONG),
    (" \n", "42", WRONG),
    ("####", "42", WRONG),
    (r"\boxed{}", "42", WRONG),
    (r"\boxed", "42", WRONG),
    # numbers, written in many ways
    ("#### 1,016", "1016", RIGHT),
    ("#### 1,01", "101", WRONG),  # not a thousands separator
    ("#### $1,016.00", "1016", RIGHT),
    (r"#### \$18", "18", RIGHT),
    ("#### \u221242", "-42", RIGHT),
    ("#### 42.", "42", RIGHT),
    ("#### 042", "42", RIGHT),
    ("#### .5", "0.5", RIGHT),
    ("#### 0.1", "1/10", RIGHT),
    ("#### 1e3", "1000", RIGHT),
    ("#### 1.5E-2", "0.015", RIGHT),
    ("#### e3", "1000", WRONG),
    ("#### -", "0", WRONG),
    ("#### 1e999999999", "1", WRONG),  # as a fraction it would fill the memory
    ("#### 0.30000000000000004", "0.3", WRONG),  # exact, not in floating point
    (r"\boxed{50\%}", "0.5", RIGHT),
    (r"\boxed{5 \text{ apples}}", "5", RIGHT),
    # symbols
    (r"\boxed{x^2+2x+1}", "(x+1)^2", RIGHT),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", RIGHT),
    (r"\boxed{\frac{3}{4}}", r"\frac{6}{8}", RIGHT),
    (r"\boxed{(1,2)}", "(1,2)", RIGHT),
    (r"\boxed{(2,1)}", "(1,2)", WRONG),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", RIGHT),
    (r"\boxed{x+1}", "x+2", WRONG),
    # several candidates are no answer
    (r"\boxed{1 or 2}", "2", WRONG),
    (r"\boxed{1, 2}", "2", WRONG),
    (r"\boxed{1; 2}", "2", WRONG),
    # adversarial
    ("#### " + "9" * (MAX_ANSWER_CHARACTERS + 1), "1", WRONG),
    (r"\boxed{" * 500, "1", WRONG),
    ("}" * 500 + r"\boxed{1}", "1", RIGHT),
    ("#### __import__('os').system('true')", "1", WRONG),
    ("#### \u0000", "1", WRONG),
    # the gold answer, as data sets write it
    ("#### 72", "Natalia sold 48/2 = 24 clips in May.\n#### 72", RIGHT),
    (r"\boxed{7}", r"We add them and get $\boxed{7}$.", RIGHT),
    ("#### 1", "", UNJUDGED),
    ("#### 1", "no number here?", UNJUDGED),
    ("nothing", "no number here?", UNJUDGED),
]


@pytest.mark.parametrize(("completion", "gold", "reward"), CASES)
def test_table(completion, gold, reward):
    assert math_answer_reward([completion], answer=[gold]) == [reward]


@pytest.mark.parametrize("gold", ["42", "1,016", r"\frac{1}{2}", r"\sqrt{8}", "(1,2)", "x^2", "#### 72", "-3.5"])
def test_the_gold_answer_itself_is_right(gold):
    assert math_answer_reward([rf"\boxed{{{final_answer(gold) or gold}}}"], answer=[gold]) == [RIGHT]


def test_chat_completions_and_columns_of_trl():
    chat = [{"role": "assistant", "content": "so #### 42"}]
    tool = [{"role": "assistant", "content": None}]
    rewards = math_answer_reward(
        completions=[chat, tool, []], answer=["42"] * 3, prompts=["q"] * 3, completion_ids=[[1]] * 3, trainer_state=None
    )
    assert rewards == [RIGHT, WRONG, WRONG]


def test_an_answer_that_would_take_for_ever_is_wrong_in_seconds():
    started = time.monotonic()
    assert math_answer_reward([r"\boxed{9^{9^{9^9}}}"], answer=["1"]) == [WRONG]
    assert time.monotonic() - started < 20


def test_works_off_the_main_thread():
    """Math-Verify's time limit is a signal, which raises in other threads."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(math_answer_reward([r"\boxed{x+x}"], answer=["2x"])))
    thread.start()
    thread.join()
    assert results == [RIGHT]


def test_rewards_import_neither_torch_nor_grpo_ext():
    code = "import sys, rewards; sys.exit(bool({'torch', 'grpo_ext', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
