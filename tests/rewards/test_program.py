"""The program reward as tables: what a model may write, the tests of its row, and the score."""

import os
import shutil
import time

import pytest

from grpo_ext.rewards import ProgramReward, program_reward
from grpo_ext.rewards.code.cases import assert_case
from grpo_ext.rewards.code.program import extract_program
from grpo_ext.rewards.code.sandbox import Limits
from tests.tools.models import random_lora
from tests.tools.training import log_of

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true",
    reason="bwrap is missing: apt install bubblewrap",
)

RIGHT, WRONG, UNSCORED = 1.0, 0.0, None
DOUBLE = {"entry_point": "double", "inputs": [[1], [-3], [40]], "outputs": [2, -6, 80]}
GOOD = "def double(x): return 2 * x"


def fenced(program: str, language: str = "python") -> str:
    return f"```{language}\n{program}\n```"


# Searches for the expected values, three even numbers of which one is negative, wherever it can: in memory, in its
# input and in files.
SEARCHES = """
import gc, marshal, os
def found_in(thing, depth=0):
    if isinstance(thing, bytes):
        try: thing = marshal.loads(thing)
        except Exception: return None
    if isinstance(thing, dict):
        thing = list(thing.values())
    if not isinstance(thing, (list, tuple)) or depth > 9:
        return None
    if len(thing) == 3 and all(type(item) is int and item % 2 == 0 for item in thing) and min(thing) < 0:
        return list(thing)
    return next(filter(None, (found_in(item, depth + 1) for item in thing)), None)
files = [os.pread(0, 10**6, 0), *(open(name, "rb").read() for name in os.listdir())]
found = next(filter(None, map(found_in, [*gc.get_objects(), *files])))
def double(x): return found.pop(0)
"""
# Finds the mark of this run, forges result lines, and then {ends}.
FORGES = """
import os, sys
mark = sys._getframe(1).f_locals["job"]["mark"]
for number in range(3, 20):
    try: os.write(number, (mark + "{value}\\n").encode() * {times})
    except OSError: pass
{ends}
def double(x): return 2 * x
"""
WRITES = """
import os
for number in range(3, 20):
    try: os.write(number, b"{text}")
    except OSError: pass
"""
EQUAL_TO_ALL = """
class Equal({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def double(x): return Equal()
"""
FORKS = """
import os, time
if os.fork() == 0:
    time.sleep(100)
def double(x): return 2 * x if os.fork() == 0 else time.sleep(100)
"""
PATCHES = """
import builtins, json, marshal, sys
sys.modules["__main__"].encode_value = lambda value: "true"
builtins.print = lambda *args, **options: None
builtins.isinstance = lambda value, kind: True
marshal.dumps = lambda value: b""
def double(x): return 0
"""

DOUBLES = [
    # where the program is
    (GOOD, RIGHT),
    (fenced(GOOD), RIGHT),
    (fenced(GOOD, "py"), RIGHT),
    (fenced(GOOD, "Python3"), RIGHT),
    (fenced(GOOD, ""), RIGHT),
    (fenced(GOOD, " python title=x"), RIGHT),
    (f"First a draft:\n{fenced('def double(x): return x')}\nand better:\n{fenced(GOOD)}\nDone.", RIGHT),
    (f"{fenced(GOOD)}\nIt prints:\n{fenced('2', 'text')}", RIGHT),  # the last Python block, not the last block
    (f"{fenced('ls', 'sh')}\n{fenced(GOOD, '')}", RIGHT),  # the last block if none is Python
    (f"  Indented:\n  ```python\n{GOOD}\n  ```", RIGHT),
    (f"```python\n{GOOD}", RIGHT),  # cut off after the program
    ([{"role": "assistant", "content": fenced(GOOD)}], RIGHT),
    ([{"role": "assistant", "content": "no"}, {"role": "assistant", "content": GOOD}], RIGHT),
    (f"{fenced(GOOD)}\n{fenced('def double(x): return x')}", WRONG),
    # other correct programs
    ("from functools import partial\nfrom operator import mul\ndouble = partial(mul, 2)", RIGHT),
    ("class A:\n  def __call__(self, x): return x + x\ndouble = A()", RIGHT),
    ("def double(x):\n  print('doubling', x, flush=True)\n  return x + x", RIGHT),
    ("def double(x): return float(x + x)", RIGHT),
    (
        "import enum\nclass A(enum.IntEnum):\n  B = 2\ndef double(x): return A.B * x if x > 1 else {1: A.B, -3: -6}[x]",
        RIGHT,
    ),
    (f"{GOOD}\nif __name__ == '__main__': print(double(int(input())))", RIGHT),
    (f"{GOOD}\nimport threading, time; threading.Thread(target=time.sleep, args=(99,)).start()", RIGHT),
    (f"{GOOD}\nimport sys; sys.stdout.close()", RIGHT),
    # wrong
    ("def double(x): return x", WRONG),
    ("def double(x): return 2", WRONG),  # one test of three
    ("def double(x): return str(2 * x)", WRONG),
    ("def double(x): return [2 * x]", WRONG),
    ("def double(x): print(2 * x)", WRONG),
    ("def double(x): yield 2 * x", WRONG),
    ("def double(): return 2", WRONG),
    ("def twice(x): return 2 * x", WRONG),
    ("double = 2", WRONG),
    ("def double(x): return double(x)", WRONG),
    ("def double(x): return lambda: 2 * x", WRONG),
    ("def double(x): raise ValueError", WRONG),
    # malformed
    ("", WRONG),
    (" \n", WRONG),
    ([], WRONG),
    ([{"role": "assistant", "content": None}], WRONG),
    ("```python\n```", WRONG),
    ("The answer is to add x to itself.", WRONG),
    ("def double(x) return 2 * x", WRONG),
    (f"```python\n{GOOD[:-5]}", WRONG),  # cut off inside the program
    ("def double(x): return 2 * x\0", WRONG),
    ("def double(x): return '\ud800'", WRONG),
    ("(" * 50_000, WRONG),
    ("```" * 50_000, WRONG),
    # exits before the tests
    (f"import sys; sys.exit(0)\n{GOOD}", WRONG),
    (f"exit()\n{GOOD}", WRONG),
    (f"raise SystemExit(0)\n{GOOD}", WRONG),
    (f"import os; os._exit(0)\n{GOOD}", WRONG),
    ("import sys\ndef double(x): sys.exit(0)", WRONG),
    ("import os\ndef double(x): os._exit(0)", WRONG),
    ("import os\ndef double(x): os.kill(os.getpid(), 9)", WRONG),
    ("import ctypes\ndef double(x): ctypes.string_at(0)", WRONG),
    (f"{GOOD}\nimport os; os.closerange(0, 256)", WRONG),
    # cheats
    (EQUAL_TO_ALL.format(base="object"), WRONG),
    (EQUAL_TO_ALL.format(base="int"), WRONG),
    (EQUAL_TO_ALL.format(base="str"), WRONG),
    (PATCHES, WRONG),
    ("print('all tests passed')\nprint(1.0)\nprint([2, -6, 80])\ndef double(x): pass", WRONG),
    (SEARCHES, WRONG),
    (FORGES.format(value="2", times=1, ends=""), WRONG),  # one line too many, in addition to three right ones
    (FORGES.format(value="2", times=3, ends="os._exit(0)"), WRONG),
    (FORGES.format(value="true", times=3, ends="os._exit(0)"), WRONG),
    (FORGES.format(value="{}", times=3, ends="os._exit(0)"), WRONG),
    (FORGES.format(value="[]", times=3, ends="os._exit(0)"), WRONG),
    (FORGES.format(value="[" * 5000, times=3, ends="os._exit(0)"), WRONG),
    (FORGES.format(value="", times=10**6, ends="os._exit(0)"), WRONG),
    (WRITES.format(text="x") + GOOD, WRONG),
    (WRITES.format(text="2\\n-6\\n80\\n") + "os._exit(0)", WRONG),  # right values, but no function was called
    # never ends
    (f"while True: pass\n{GOOD}", WRONG),
    ("def double(x): return 2 * x if x < 40 else __import__('time').sleep(100)", WRONG),
    (FORKS, WRONG),
    # too much
    ("def double(x): return 10 ** 10 ** 9", WRONG),
    ("def double(x): return '2' * 10**7", WRONG),
    ("def double(x): return [2] * 10**7", WRONG),
    ("def double(x): return bytearray(10**10)", WRONG),
    ("def double(x):\n  y = []\n  for _ in range(10**5): y = [y]\n  return y", WRONG),
    ("def double(x):\n  y = []\n  y.append(y)\n  return y", WRONG),
    ("def double(x):\n  y = [2]\n  for _ in range(60): y = [y, y]\n  return y", WRONG),
]


@pytest.fixture(scope="module")
def doubles() -> list[float | None]:
    """The scores of the whole table, in one call so that programs run in parallel."""
    columns = {name: [value] * len(DOUBLES) for name, value in DOUBLE.items()}
    return ProgramReward(limits=Limits(seconds=2))([completion for completion, _ in DOUBLES], **columns)


@pytest.mark.parametrize("row", range(len(DOUBLES)))
def test_what_a_program_earns(row, doubles):
    """If a wrong program scores, the model learns to cheat. If a correct one does not, it learns nothing."""
    assert doubles[row] == DOUBLES[row][1]


# The returned value, the expected value in the column `outputs`, and the score.
VALUES = [
    # numbers compare as in Python, floats within 1e-9 of their size
    ("1.0", 1, RIGHT),
    ("True", 1, RIGHT),
    ("1", True, RIGHT),
    ("1 + 1e-12", 1, WRONG),  # the expected value is not a float, so it must be exact
    ("0.1 + 0.2", 0.3, RIGHT),
    ("3", 3.0, RIGHT),
    ("1.00001", 1.0, WRONG),
    ("1e-20", 0.0, RIGHT),
    ("1e-6", 0.0, WRONG),
    ("float('nan')", float("nan"), RIGHT),
    ("float('nan')", 0.0, WRONG),
    ("float('inf')", float("inf"), RIGHT),
    ("float('-inf')", float("inf"), WRONG),
    ("float('inf')", 1e308, WRONG),
    ("10**400", 10**400, RIGHT),
    ("10**400 + 1", 10**400, WRONG),
    ("-10**5000", -(10**5000), RIGHT),  # more decimal digits than Python converts
    ("10**400", 1.5, WRONG),  # too large for a float
    ("1 + 2j", 1 + 2j, RIGHT),
    ("1", "1", WRONG),
    ("'1'", 1, WRONG),
    ("0", None, WRONG),
    ("None", None, RIGHT),
    ("None", False, WRONG),
    # text
    ("'é\\n\\0\\U0001f600'", "é\n\0\U0001f600", RIGHT),
    ("'\\ud800'", "\ud800", RIGHT),
    ("'int'", "int", RIGHT),
    ("b'ab'", b"ab", RIGHT),
    ("b'ab'", "ab", WRONG),
    # containers; JSON has no tuples
    ("(1, 2)", [1, 2], RIGHT),
    ("[1, (2, 3)]", [1, [2, 3]], RIGHT),
    ("[2, 1]", [1, 2], WRONG),
    ("[1, 2, 3]", [1, 2], WRONG),
    ("[1]", [1, 2], WRONG),
    ("[]", [], RIGHT),
    ("[]", {}, WRONG),
    ("[[]]", [], WRONG),
    ("['list', 1]", ["list", 1], RIGHT),
    ("{1, 2}", [1, 2], WRONG),
    ("range(2)", [0, 1], WRONG),  # as in Python
    ("{1, 2}", {2, 1}, RIGHT),
    ("frozenset({1, (2, 'a')})", {1, (2, "a")}, RIGHT),
    ("{1, 3}", {1, 2}, WRONG),
    ("[1, 2]", {1, 2}, WRONG),
    ("{'a': 0.1 + 0.2}", {"a": 0.3}, RIGHT),
    ("__import__('collections').Counter('aab')", {"a": 2, "b": 1}, RIGHT),
    ("__import__('collections').OrderedDict(b=1, a=2)", {"a": 2, "b": 1}, RIGHT),
    ("{1: 2}", {"1": 2}, WRONG),
    ("{'a': 1}", {"a": 2}, WRONG),
    ("{'a': 1, 'b': 1}", {"a": 1}, WRONG),
    ("[1, object()]", [1, None], WRONG),
    # numbers with colliding hashes: building a set of them outside the sandbox would take minutes
    ("{n * (2**61 - 1) for n in range(10**4)}", {1}, WRONG),
]


@pytest.fixture(scope="module")
def values() -> list[float | None]:
    programs = [f"def f(): return {expression}" for expression, *_ in VALUES]
    outputs = [[expected] for _, expected, _ in VALUES]
    return ProgramReward(limits=Limits(seconds=10))(
        programs, entry_point=["f"] * len(VALUES), inputs=[[[]]] * len(VALUES), outputs=outputs
    )


@pytest.mark.parametrize("row", range(len(VALUES)))
def test_which_values_are_equal(row, values):
    """Data sets write values in many ways, and losing a type on the way out would make some rows unsolvable."""
    assert values[row] == VALUES[row][2]


ASSERTS = [
    # a program that passes the test, and one that does not
    ("assert f(1, 'a') == [1, 'a']", "def f(x, y): return [x, y]", "def f(x, y): return (x, y)"),
    ("assert f((3, 4), (5, 4)) == (4,)", "def f(x, y): return (4,)", "def f(x, y): return [4]"),
    ("assert (f([1, 2], k=2)) == {1: 'a'}, 'no'", "def f(x, k): return {k - 1: 'a'}", "def f(x, k): return {k: 'a'}"),
    ("assert [1] == f()", "def f(): return [1]", "def f(): return [2]"),
    ("assert f(-1.5, None, 2j, b'', {'a': ()}) == 'a'", "def f(*a): return min(a[4])", "def f(*a): return a[4]"),
    ("assert f(set([1]), float('inf')) == set()", "def f(x, y): return x - {1}", "def f(x, y): return x"),
    ("assert f(2) == True", "def f(x): return True", "def f(x): return False"),
    ("assert f(2)", "def f(x): return [0]", "def f(x): return []"),
    ("assert f('a')", "import re\ndef f(x): return re.match(x, x)", "import re\ndef f(x): return re.match(x, 'b')"),
    ("assert not f(2)", "def f(x): return ''", "def f(x): return 'x'"),
    ("assert f(2) is True", "def f(x): return True", "def f(x): return 1"),
    ("assert f(2) is None", "def f(x): pass", "def f(x): return 0"),
    ("assert set(f(1)) == set((2, 3))", "def f(x): return [3, 2, 3]", "def f(x): return [3]"),
    ("assert sorted(f(1)) == sorted([3, 2])", "def f(x): return {3, 2}", "def f(x): return {3}"),
    ("assert len(list(f(1))) == 3", "def f(x): return iter('abc')", "def f(x): return iter('ab')"),
    ("assert round(f(1), 2) == 0.33", "def f(x): return 1 / 3", "def f(x): return 1 / 2"),
    ("assert math.isclose(f(1), 3.14, rel_tol=0.01)", "def f(x): return 3.15", "def f(x): return 3.2"),
    ("assert math.isclose(3.14, f(1))", "def f(x): return 3.14", "def f(x): return 3.14001"),
    ("assert abs(f(1) - 3.14) < 1e-2", "def f(x): return 3.149", "def f(x): return 3.2"),
    ("assert abs(f(1) - 3.14) <= 0.01", "def f(x): return 3.149", "def f(x): return '3.14'"),
    ("assert f(1.0 / 3) == 1.0 / 3", "def f(x): return x", "def f(x): return 0.3"),
    ("assert f('a' + 'b') == 'ab' * 2", "def f(x): return x + x", "def f(x): return x"),
    ("assert f([1, 0 ** 0], 3 * 19) == [1, 1, 57]", "def f(x, y): return [*x, y]", "def f(x, y): return x"),
    ("assert f(2 ** 40 // 3 % 7 - 1) == (-1) ** 2", "def f(x): return 1", "def f(x): return -1"),
    ("assert Solution().f(1) == 1", "class Solution:\n  def f(self, x): return x", "class Solution: pass"),
    ("assert sorted(A(3).f(1)) == [1]", "class A(list):\n  __init__ = print\n  def f(self, x): return {x}", "A = set"),
    ("assert f(5, 12) == 314.15926535897927", "def f(r, h): return 3.141592653589793 * 100", "def f(r, h): return 314"),
]  # fmt: skip


def test_asserts_of_data_sets():
    """Each supported form of a test must tell a correct program from a wrong one."""
    tests = [[line] for line, _, _ in ASSERTS]
    reward = ProgramReward(limits=Limits(seconds=10))
    right = reward([right for _, right, _ in ASSERTS], test_list=tests)
    wrong = reward([wrong for _, _, wrong in ASSERTS], test_list=tests)
    results = [(line, *pair) for (line, *_), *pair in zip(ASSERTS, right, wrong, strict=True)]
    assert results == [(line, RIGHT, WRONG) for line, *_ in ASSERTS]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "f(1) == 2",
        "assert f(1) == ",
        "assert f(1) == 2; assert f(2) == 3",
        "assert f(1) == f(2)",
        "assert f(x) == 2",
        "assert f(*[1]) == 2",
        "assert f(**{'a': 1}) == 2",
        "assert sorted(f(1), reverse=True) == [2, 1]",
        "assert f(1)[0] == 2",
        "assert f(1) + 1 == 2",
        "assert f(1) > 2",
        "assert f(1) == 2 and f(2) == 3",
        "assert max_height(Node(1)) == 3",
        "assert abs(f(1) - 'a') < 1",
        "assert math.isclose(f(1), 'a')",
        "assert f(1) == {frozenset({1})}",  # could never pass, see grpo_ext.rewards.code.cases
        "assert True",
        "assert 'a'.f(1) == 2",
        "assert Solution(x).f(1) == 2",
        "assert f(9 ** 9 ** 9) == 2",
        "assert f('a' * 10 ** 9) == 2",
        "assert f(1 / 0) == 2",
    ],
)
def test_an_unsupported_test_is_an_error(line):
    """Scoring it 0 would tell the model that every program is wrong. The message must name the test."""
    with pytest.raises(ValueError, match="is not supported") as error:
        program_reward(["def f(x): return 2"], test_list=[["assert f(1) == 2", line]])
    assert repr(line) in str(error.value)
    assert "completion 0" in str(error.value)
    with pytest.raises(ValueError, match="is not supported"):
        assert_case(line)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": ["1"]}, "the data set has: answer"),
        ({}, "the data set has: none"),
        ({"stdin": [["1"]]}, "needs the columns"),
        ({"test_list": [[]]}, "a list of one or more tests"),
        ({"test_list": ["assert f(1) == 2"]}, "Expecting value"),  # neither a list nor JSON text of one
        ({"stdin": [["1", "2"]], "stdout": [["1"]]}, "shorter"),
        ({"stdin": [[1]], "stdout": [["1"]]}, "must be a text or a list of lines; got 1"),
        ({"entry_point": ["f"], "inputs": [[[1], [2]]], "outputs": [[1]]}, "shorter"),
        ({"entry_point": ["f"], "inputs": [[1]], "outputs": [[1]]}, "must be a list"),
        ({"entry_point": ["f("], "inputs": [[[1]]], "outputs": [[1]]}, "must be a name or an expression"),
        ({"entry_point": ["f"], "inputs": [[[object]]], "outputs": [[1]]}, "not plain data"),
        ({"entry_point": ["f"], "inputs": [[[1]]], "outputs": [[object]]}, "not plain data"),
    ],
)
def test_wrong_columns_are_an_error(columns, message):
    """Otherwise a mistake in the data would only show as a reward that stays at 0."""
    with pytest.raises(ValueError, match=message):
        program_reward(["def f(x): return 2"], **columns)


STREAMS = [
    ("print(sum(map(int, input().split())))", RIGHT),
    ("import sys\nfor line in sys.stdin: print(sum(int(n) for n in line.split()), ' ')", RIGHT),
    ("import sys; sys.stdout.write(str(sum(map(int, sys.stdin.read().split()))) + '\\n\\n')", RIGHT),
    ("def main(): print(sum(map(int, input().split())))\nif __name__ == '__main__': main()", RIGHT),
    ("print(sum(map(int, input().split()))); exit()", RIGHT),
    (fenced("print(sum(map(int, input().split())))"), RIGHT),
    ("print(3)", WRONG),
    ("print('', sum(map(int, input().split())))", WRONG),  # a leading space counts
    ("print(sum(map(int, input().split())), 'done')", WRONG),
    ("print(sum(map(int, input().split())))\n1 / 0", WRONG),
    ("print(sum(map(int, input().split())), flush=True)\nwhile True: pass", WRONG),
    ("print('x' * 10**7)", WRONG),
    ("import sys; sys.exit(0)", WRONG),
    ("import os; os.write(1, b'\\xff\\xfe')", WRONG),
    ("", WRONG),
]


def test_programs_that_read_their_input():
    """Only white space at the end of lines and of the output is ignored. A crash or an endless loop is a failure."""
    tests = {"stdin": ["1 2\n", "-4 4"], "stdout": ["3\n", "0"]}
    columns = {name: [value] * len(STREAMS) for name, value in tests.items()}
    assert ProgramReward(limits=Limits(seconds=2))([program for program, _ in STREAMS], **columns) == [
        reward for _, reward in STREAMS
    ]


def test_which_white_space_counts():
    """Like programming contests, ignore white space at the end of lines and of the output, and nowhere else."""
    outputs = ["1\n2", "1 \n2\t\n\n", "1\n\n2", " 1\n2", "1 2", "\n1\n2"]
    programs = [f"print({output!r}, end='')" for output in outputs]
    stdin, stdout = [[""]] * len(outputs), [["1\n2\n"]] * len(outputs)
    assert program_reward(programs, stdin=stdin, stdout=stdout) == [RIGHT, RIGHT, WRONG, WRONG, WRONG, WRONG]


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "score"),
    [
        ("0.30000000000000004", "0.3", None, RIGHT),
        ("3", "3.0", None, RIGHT),
        ("1e-3 yes", "0.001 yes", None, RIGHT),
        ("0.300001", "0.3", None, WRONG),
        ("0.300001", "0.3", 1e-4, RIGHT),
        ("0.31", "0.3", 1e-4, WRONG),
        ("3.0", "3", None, WRONG),  # an integer is expected, so its text counts
        ("3.0", "3", 1e-4, WRONG),
        ("0.3 no", "0.3 yes", None, WRONG),
        ("0.3 0.3", "0.3", None, WRONG),
        ("0.3 0.3", "0.3\n0.3", None, WRONG),
        ("nan", "0.3", None, WRONG),
        ("inf", "1e999", None, WRONG),
        ("1e9999", "1e999", None, WRONG),
        ("", "0.3", None, WRONG),
    ],
)
def test_floats_in_the_output(output, expected, tolerance, score):
    """Two right programs may print other last digits. A number that needs a tolerance has a decimal point."""
    columns = {"stdin": [[""]], "stdout": [[expected]], "float_tolerance": [tolerance]}
    assert program_reward([f"print({output!r})"], **columns) == [score]


def test_processes_that_train_together_share_the_cores(monkeypatch):
    """Otherwise eight processes would run eight times as many programs as there are cores, and right ones would fail at
    their time limit. Sharing cores with a thousand processes, this one runs one program at a time."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    started = time.monotonic()
    program = "import time; time.sleep(2); print(input())"
    assert program_reward([program] * 2, stdin=[["a"]] * 2, stdout=[["a"]] * 2) == [RIGHT, RIGHT]
    assert time.monotonic() - started >= 4


def test_an_empty_program_scores_zero():
    """If a test expects no output, an empty program would pass it."""
    assert program_reward(["", "pass"], stdin=[["1"]] * 2, stdout=[[""]] * 2) == [WRONG, RIGHT]


def test_the_fraction_of_passed_tests():
    """Each test counts, including those that passed before a timeout, an exit or an error."""
    reward = ProgramReward(share=True, limits=Limits(seconds=2))
    programs = [
        GOOD,
        "def double(x): return 2",
        "def double(x): return 2 * abs(x)",
        "def double(x): return 2 * x if x < 40 else __import__('time').sleep(100)",
        "def double(x): return 2 * x if x > 0 else exit()",
        FORGES.format(value="2", times=1, ends=""),
        "",
    ]
    columns = {name: [value] * len(programs) for name, value in DOUBLE.items()}
    assert reward(programs, **columns) == [1, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 0, 0]
    assert reward(["print(3)"], stdin=[["1 2", "0 3", "0 4"]], stdout=[["3", "3", "4"]]) == [2 / 3]


def test_the_tests_of_a_program_take_bounded_time_together():
    """If each test had the whole limit to itself, a program could block the training for a thousand times as long."""
    started = time.monotonic()
    for share in (False, True):
        reward = ProgramReward(share=share, limits=Limits(seconds=1), total_seconds=3)
        assert reward(["while True: pass"], stdin=[["1"] * 1000], stdout=[["1"] * 1000]) == [0]
    reward = ProgramReward(share=True, limits=Limits(seconds=1), total_seconds=3)
    assert reward(["import time\ndef f(): time.sleep(9)"], test_list=[["assert f()"] * 1000]) == [0]
    assert time.monotonic() - started < 600


def test_starting_the_sandbox_costs_the_program_nothing():
    """Data sets of programming contests have hundreds of tests per problem. The starts alone take longer than this
    limit, and a right program must not fail for it."""
    numbers = range(150)
    columns = {"stdin": [[f"{n} 2\n" for n in numbers]], "stdout": [[f"{n + 2}\n" for n in numbers]]}
    reward = ProgramReward(share=True, limits=Limits(seconds=3))
    assert reward(["print(sum(map(int, input().split())))"], **columns) == [RIGHT]
    writes = "open('/tmp/x', 'x').write('1')\nprint(sum(map(int, input().split())))"  # needs a sandbox per test
    assert reward([writes], **columns) == [RIGHT]
    calls = {"entry_point": ["add"], "inputs": [[[n, 2] for n in numbers]], "outputs": [[n + 2 for n in numbers]]}
    assert reward(["def add(x, y): return x + y"], **calls) == [RIGHT]


def test_each_test_has_the_whole_time_limit():
    """Data sets state the limit per test. A program that needs half of it for each of four tests is right."""
    reward = ProgramReward(limits=Limits(seconds=4))
    program = "import time; time.sleep(2); print(input())"
    assert reward([program], stdin=[list("abcd")], stdout=[list("abcd")]) == [RIGHT]


STATE_FOUND = """
import os, sys, time
def state():
    found = os.listdir("/tmp")
    found += [n for n in range(2, os.getpid()) if n != os.getppid() and alive(n)]
    found += [name for name in ("left", "solution_left") if name in sys.modules or hasattr(os, name)]
    {leaves}
    return found
def alive(n):
    try: os.kill(n, 0)
    except ProcessLookupError: return False
    except PermissionError: pass
    return True
print(state())
"""


@pytest.mark.parametrize(
    "leaves",
    [
        "open('/tmp/left', 'w').write('x')",
        "os.makedirs('/tmp/left/' + 'x/' * 500)",
        "os.symlink('/', '/tmp/left')",
        "os.mkdir('/tmp/left', 0)",
        "os.fork() or (os.setsid(), os.fork() and os._exit(0), time.sleep(600))",
        "sys.modules['left'] = os.left = os",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 19)",
    ],
)
def test_a_test_leaves_nothing_to_the_next(leaves):
    """A program that remembers earlier tests could count them, or leave a module to be imported."""
    program = STATE_FOUND.format(leaves=leaves)
    tests = {"stdin": [["", "", ""]], "stdout": [["[]", "[]", "[]"]]}
    score = ProgramReward(share=True, limits=Limits(seconds=5))([program], **tests)
    if "getppid" in leaves:  # such a run may itself fail
        assert score[0] in (0, 1 / 3, 2 / 3, 1)
        assert program_reward(["print([])"], **tests) == [RIGHT]
    else:
        assert score == [RIGHT]


def test_each_call_has_its_own_arguments():
    """A function that changes its argument must not affect the next test."""
    shared = [3, 1, 2]
    columns = {"entry_point": ["f"], "inputs": [[[shared], [shared]]], "outputs": [[3, 3]]}
    assert program_reward(["def f(x):\n  x.append(0)\n  return len(x) - 1"], **columns) == [RIGHT]


def test_each_method_call_has_a_new_object():
    """LeetCode-style data sets have `Solution().solve` as the entry point."""
    solution = (
        "class Solution:\n  def __init__(self): self.n = 0\n  def add(self, x):\n    self.n += x\n    return self.n"
    )
    columns = {"entry_point": ["Solution().add"], "inputs": [[[1], [2]]], "outputs": [[1, 2]]}
    assert program_reward([solution], **columns) == [RIGHT]


def test_lists_may_be_json_text():
    """A column of a data set has one type, so arguments of mixed types are given as JSON text."""
    columns = {
        "entry_point": ["f"],
        "inputs": ['[[1, "a"], [{"k": null}, 2.5]]'],
        "outputs": ['[[1, "a"], [{"k": null}, 2.5]]'],
    }
    assert program_reward(["def f(x, y): return x, y"], **columns) == [RIGHT]


def test_rows_of_other_tasks_are_not_scored():
    """In a mixed data set the columns of one task are None in the rows of another."""
    columns = {
        "test_list": [["assert f() == 1"], None, None, None],
        "entry_point": [None, "f", None, None],
        "inputs": [None, [[]], None, [[]]],
        "outputs": [None, [1], None, [1]],
    }
    programs = ["def f(): return 1", "def f(): return 2", "def f(): return 1", "def f(): return 1"]
    assert program_reward(programs, **columns) == [RIGHT, WRONG, UNSCORED, UNSCORED]


def test_only_one_kind_of_test_counts():
    """If a row has several kinds of tests, the one that the documentation lists first is used."""
    columns = {"test_list": [["assert f() == 1"]], "stdin": [["1"]], "stdout": [["1"]]}
    assert program_reward(["print(input())"], **columns) == [RIGHT]


def test_extract_program_is_linear_in_the_text():
    """Models repeat themselves; a search that backtracks over the repetitions would stall the training."""
    started = time.process_time()
    for text in ("```python\n" * 20_000, "```" * 100_000, " " * 200_000 + "`", "\n ```" * 50_000):
        extract_program(text)
    assert time.process_time() - started < 5


def test_without_the_sandbox():
    """Running without the sandbox, which must be allowed explicitly, gives the same scores."""
    reward = ProgramReward(allow_unsandboxed=True)
    columns = {name: [value] * 2 for name, value in DOUBLE.items()}
    assert reward([GOOD, "def double(x): return x"], **columns) == [RIGHT, WRONG]


def test_refused_without_bubblewrap(monkeypatch):
    """If a package is missing, programs must neither run unprotected nor score 0."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="bwrap was not found"):
        program_reward([GOOD], **{name: [value] for name, value in DOUBLE.items()})


@pytest.mark.parametrize("reward", [program_reward, ProgramReward(share=True)], ids=["default", "share"])
def test_in_a_trainer(build, small_model, reward):
    """TRL must accept an object as a reward, pass it the columns, and log it under a readable name."""
    columns = {name: [value] * 4 for name, value in DOUBLE.items()}
    trainer = build(small_model, reward=reward, columns=columns, peft_config=random_lora(), max_steps=1)
    trainer.train()
    assert log_of(trainer, "rewards/program_reward/mean") == [0.0]
