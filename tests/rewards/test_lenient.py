r"""Answers that are right outside of the demanded format, and those that are wrong in any format."""

import shutil

import pytest

from grpo_ext.rewards import (
    MathAnswerReward,
    ProgramReward,
    isolated,
    lenient_math_reward,
    lenient_program_reward,
    math_answer_reward,
)
from grpo_ext.rewards.lenient import lenient_version

ADD = {"entry_point": ["add"], "inputs": [[[1, 2]]], "outputs": [[3]]}
PROMPT = 'def add(a, b):\n    """The sum."""\n'


@pytest.mark.parametrize(
    ("completion", "gold", "strict", "lenient"),
    [
        ("So she pays 42 dollars.", "42", 0.0, 1.0),
        ("20 + 22 = 42", "42", 0.0, 1.0),
        ("She has $1,234.50.", "1234.5", 0.0, 1.0),
        ("It drops to -7 degrees.", "-7", 0.0, 1.0),
        ("That is 3/4 of it", "0.75", 0.0, 1.0),
        ("First 42, then 41", "42", 0.0, 0.0),  # the last number counts
        ("#### 42", "42", 1.0, 1.0),
        ("#### 41, or is it 42", "42", 0.0, 0.0),  # a marked answer counts
        ("<think>42</think> I do not know.", "42", 0.0, 0.0),
        ("", "42", 0.0, 0.0),
        ("no number", "42", 0.0, 0.0),
        ("9" * 50_000, "42", 0.0, 0.0),
    ],
)
def test_numbers_outside_of_the_format(completion, gold, strict, lenient):
    assert math_answer_reward([completion], answer=[gold]) == [strict]
    assert lenient_math_reward([completion], answer=[gold]) == [lenient]
    message = [{"role": "assistant", "content": completion}]
    assert lenient_math_reward([message], answer=[gold], prompts=["What?"]) == [lenient]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("    return a + b\n", 1.0),
        ("    return a + b\n\nprint(add(1, 2)\n", 1.0),  # what follows the function does not count
        ("    c = a\n\n    return c + b\ndef add(a, b): return 0\n", 1.0),
        ("```python\ndef add(a, b): return a + b\n```", 1.0),
        ("    return a - b\n", 0.0),
        ("", 0.0),
    ],
)
def test_a_continued_prompt_is_a_program(completion, score):
    not_columns = {"trainer_state": object(), "log_metric": print}  # as TRL passes them
    assert lenient_program_reward([completion], prompts=[PROMPT], **ADD, **not_columns) == [score]


def test_which_rewards_have_a_lenient_version():
    assert lenient_version(MathAnswerReward(strict=True)) == lenient_math_reward
    assert lenient_version(isolated(math_answer_reward)) == lenient_math_reward
    assert lenient_version(ProgramReward(share=True)).reward == ProgramReward(share=True)
    assert lenient_version(lambda completions, **columns: [0.0]) is None
