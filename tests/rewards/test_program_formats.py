"""Tests of programs in the formats of public data sets: a right program scores, a wrong one does not."""

import base64
import json
import os
import pickle
import shutil
import zlib

import pytest

from grpo_ext.rewards import ProgramReward, program_reward

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true",
    reason="bwrap is missing: apt install bubblewrap",
)

ADD = "def add(a, b): return a + b"
METHOD = "class Solution:\n  def add(self, a: int, b: List[int]) -> int: return a + sum(b)"
READS = "print(sum(map(int, input().split())))"

HUMAN_EVAL = """
METADATA = {"author": "x"}


def check(candidate):
    "Adds."
    assert candidate(1, 2) == 3, "no"
    assert abs(candidate(0.1, 0.2) - 0.3) < 1e-6
    assert True, "end"
    assert candidate(2 * 3, 1) == 7
"""
LOOPS = """
def check(candidate):
    assert candidate(1, 0) == candidate(1, 0)
    print
    for x in range(-2, 2):
        assert candidate(x ** 2, 1) == x ** 2 + 1
    for y in [3, 4]:
        z = y
        assert candidate(y, 0) == z
    assert candidate(y, z + 1) == 9
"""
NAMED = """
def check(f):
    x = [1]
    y = f(x, x)
    assert y == [1, 1]
    assert f(x, []) == x
"""
LEETCODE = """
def check(candidate):
    assert candidate(a=1, b=[2]) == 3
    assert candidate(a=1, b=[]) == 1
"""
KODCODE = """
from solution import add
import pytest

def test_one():
    assert add(1, 2) == 3

def test_two():
    r = add(1, 1)
    assert r == 2
"""
TWO_CALLS = """
def check(candidate):
    assert candidate(1) == 1
    assert candidate(1) > candidate(2)
"""


def packed(tests: object) -> str:
    return packed_pickle(json.dumps(tests))


def packed_pickle(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def open_r1(*tests: dict[str, object]) -> dict[str, object]:
    return {"language": "python", "test_cases": list(tests)}


def cases(kind: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"input": given, "output": expected, "testtype": kind} for given, expected in pairs]


# A row, a program that passes its tests, and one that fails only the last test.
FORMATS = {
    "HumanEval": (
        {
            "entry_point": "add",
            "test": HUMAN_EVAL,
        },
        ADD,
        "def add(a, b): return a + b if a < 6 else 0",
    ),
    "HumanEval, with a name": (
        {"entry_point": "add", "test": NAMED},
        ADD,
        "def add(a, b): return [1, 1]",
    ),
    "HumanEval, with loops": (
        {"entry_point": "add", "test": LOOPS},
        ADD,
        "def add(a, b): return a + b if (a, b) != (4, 5) else 0",
    ),
    "HumanEval, with statements around the function": (
        {"entry_point": "add", "test": f"'Adds.'\nimport math\n{HUMAN_EVAL}\ncheck(add)\n"},
        ADD,
        "def add(a, b): return a + b if a < 6 else 0",
    ),
    "LeetCode": (
        {"entry_point": "Solution().add", "test": LEETCODE},
        METHOD,
        METHOD.replace("a + sum(b)", "3"),
    ),
    "KodCode": (
        {"test": KODCODE},
        ADD,
        "def add(a, b): return 3",
    ),
    "APPS": (
        {"input_output": json.dumps({"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]})},
        READS,
        "print(3)",
    ),
    "APPS, lists of lines": (
        {"input_output": json.dumps({"inputs": [["1", "2"], ["2", "2"]], "outputs": [["3", ""], ["4", ""]]})},
        "print(int(input()) + int(input()))",
        "print(3)",
    ),
    "TACO, a function": (
        {"input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [1, 2]]})},
        ADD,
        "def add(a, b): return 3",
    ),
    "APPS, a method": (
        {"input_output": json.dumps({"fn_name": "add", "inputs": [[1, [2]], [2, [2]]], "outputs": [3, 4]})},
        METHOD,
        METHOD.replace("a + sum(b)", "3"),
    ),
    "CodeContests": (
        {
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["2 2\n"], "output": ["4\n"]},
        },
        READS,
        "print(3)",
    ),
    "LiveCodeBench": (
        {
            "public_test_cases": json.dumps(cases("stdin", ("1 2\n", "3\n"))),
            "private_test_cases": packed(cases("stdin", ("2 2\n", "4\n"))),
            "metadata": "{}",
        },
        READS,
        "print(3)",
    ),
    "LiveCodeBench, a method": (
        {
            "public_test_cases": json.dumps(cases("functional", ("1\n[2, 3]", "6"))),
            "private_test_cases": json.dumps(cases("functional", ("2\n[]", "2"))),
            "metadata": json.dumps({"func_name": "add"}),
        },
        METHOD,
        METHOD.replace("a + sum(b)", "6"),
    ),
    "open-r1": (
        {
            "verification_info": open_r1(
                {"fn_name": None, "input": "1 2\n", "output": "3\n", "type": "stdin_stdout"},
                {"input": "2 2", "output": "4"},
            )
        },
        READS,
        "print(3)",
    ),
    "open-r1, a function": (
        {
            "verification_info": json.dumps(
                open_r1(
                    {"fn_name": "add", "input": [1, 2], "output": [3]},
                    {"fn_name": "add", "input": "[2, 2]", "output": "4"},
                )
            )
        },
        ADD,
        "def add(a, b): return 3",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_data_sets(name):
    """A user gives the data set as it was published. Each of its tests must count, and the last one not be lost."""
    row, right, wrong = FORMATS[name]
    columns = {column: [value] * 3 for column, value in row.items()}
    assert program_reward([right, wrong, "pass"], **columns) == [1.0, 0.0, 0.0]
    share = ProgramReward(share=True)([wrong], **{column: [value] for column, value in row.items()})
    assert 0 < share[0] < 1


class Harmful:
    def __reduce__(self):
        return os.putenv, ("x", "y")


REFUSED = {
    "a loop": (
        {"entry_point": "f", "test": "def check(candidate):\n  for x in numbers():\n    assert candidate(x) == x"},
        r"test, entry_point: 'for x in numbers\(\):.*cannot be converted into a call. Give the row `test_list`",
    ),
    "a long loop": (
        {"entry_point": "f", "test": "def check(c):\n  for x in range(10000000000000000000000):\n    assert c(x) == x"},
        "for x in range.*cannot be converted",
    ),
    "a loop in a loop": (
        {"entry_point": "f", "test": "def check(c):\n  for x in [1]:\n    for y in [1]:\n      assert c(x) == y"},
        "cannot be converted",
    ),
    "another test": (
        {"entry_point": "f", "test": TWO_CALLS},
        r"is not supported .* Give the row `test_list`",
    ),
    "no check": ({"entry_point": "f", "test": "import math"}, "there is no 'def check"),
    "a test outside of check": (
        {"entry_point": "f", "test": "def check(c): assert c(1) == 1\nassert f(5) == 7"},
        r"'assert f\(5\) == 7' cannot be converted",
    ),
    "a second check": ({"entry_point": "f", "test": "def check(c): assert c(1) == 1\n" * 2}, "cannot be converted"),
    "no asserts": ({"entry_point": "f", "test": "def check(candidate): assert True"}, "a list of one or more tests"),
    "a fixture": ({"test": "def test_f(tmp_path):\n  assert f(tmp_path) == 1"}, "cannot be converted"),
    "an exception": (
        {"test": "def test_f():\n  with pytest.raises(ValueError):\n    f(1)"},
        "with pytest.raises.*cannot be converted",
    ),
    "a class": ({"test": "class TestF:\n  def test_f(self): assert f() == 1"}, "cannot be converted"),
    "syntax": ({"test": "def test_f("}, "completion 0: test: "),
    "another language": (
        {"verification_info": {"language": "cpp", "test_cases": []}},
        "the language is 'cpp'; the reward runs Python only. Leave the row out",
    ),
    "no function": (
        {"public_test_cases": json.dumps(cases("functional", ("1", "1")))},
        "metadata has no 'func_name'",
    ),
    "a harmful pickle": (
        {"public_test_cases": "[]", "private_test_cases": packed_pickle(Harmful())},
        "expected a text",
    ),
    "no private tests": (
        {"public_test_cases": "[]", "private_test_cases": "abcd"},
        "public_test_cases: private_test_cases is neither JSON nor a compressed pickle of JSON text",
    ),
    "a broken pickle": (
        {"public_test_cases": "[]", "private_test_cases": base64.b64encode(zlib.compress(b"abc")).decode()},
        "private_test_cases is neither JSON nor a compressed pickle of JSON text",
    ),
    "a missing key": ({"input_output": '{"inputs": ["1"]}'}, "input_output: the key 'outputs' is missing"),
    "no dict": ({"input_output": "[]"}, "input_output: "),
    "a strange name": (
        {"input_output": json.dumps({"fn_name": "f() or g", "inputs": [[1]], "outputs": [1]})},
        "not the name of a function",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_read_is_an_error(name):
    """If only some tests of a row counted, a wrong program could score. The message must say what to do."""
    row, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        program_reward(["def f(x): return x"], **{column: [value] for column, value in row.items()})


def test_the_usual_imports():
    """Solutions of LeetCode name List and deque without importing them, since its editor has done so."""
    program = (
        "class Solution:\n  def f(self, x: List[int]) -> int: return max(accumulate(deque(x))) + math.inf * 0 + gcd(*x)"
    )
    program = program.replace(" + math.inf * 0", " + bisect.bisect(x, inf) + pow(2, 3, 5)")
    columns = {"entry_point": ["Solution().f"], "inputs": [[[[4, 6]]]], "outputs": [[10 + 2 + 3 + 2]]}
    assert program_reward([program], **columns) == [1.0]
    assert ProgramReward(prelude=False)([program], **columns) == [0.0]
    plain = {"entry_point": ["f"], "inputs": [[[[4, 6]]]], "outputs": [[2]]}
    assert program_reward(["def f(x): return gcd(*x)"], **plain) == [0.0]
    assert ProgramReward(prelude=True)(["def f(x): return gcd(*x)"], **plain) == [1.0]


@pytest.mark.parametrize("function", ["gcd", "math.gcd", "(gcd)"])
def test_the_program_must_define_the_function(function):
    """An import of ours must not pass the tests in place of the program."""
    columns = {"entry_point": [function], "inputs": [[[4, 6]]], "outputs": [[2]]}
    reward = ProgramReward(prelude=True)
    assert reward(["pass"], **columns) == [0.0]
    assert reward(["import math\nfrom math import gcd"], **columns) == [1.0]


def test_a_builtin_is_not_the_function_of_the_program():
    """Data sets have functions named like builtins, and an empty program would pass their tests."""
    tests = [
        {"entry_point": "sum", "inputs": [[[2, 1]]], "outputs": [3]},
        {"test_list": ["assert sum([2, 1]) == 3"]},
        {"input_output": json.dumps({"fn_name": "sum", "inputs": [[[2, 1]]], "outputs": [3]})},
    ]
    for row in tests:
        columns = {name: [value] * 2 for name, value in row.items()}
        assert program_reward(["pass", "def sum(x): return x[0] + x[1]"], **columns) == [0.0, 1.0]
