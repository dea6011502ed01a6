"""Scores Python programs by tests, in a sandbox that never learns the right answers.

    program_reward(["```python\\ndef add(a, b): return a + b\\n```"],
                   entry_point=["add"], inputs=[[[1, 2], [3, 4]]], outputs=[[3, 7]])  ->  [1.0]

Arguments go into the sandbox, returned data comes out, and this process compares. So a program has nothing to gain from
patching, reading, printing or ending early what surrounds it: whatever it sends back earns only where it is right.
What the sandbox stops, and what it does not: `rewards.code.sandbox`.
"""

import json
import marshal
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from rewards.code.cases import Case, assert_case, returns_case
from rewards.code.sandbox import Limits, Outcome, run_program
from rewards.completion import Completion, text_of

# A test is a call, or a pair of standard input and standard output.
Test = Case | tuple[str, str]

CALLS = (Path(__file__).parent / "guest" / "calls.py").read_text()

# Language and text of a fenced block; one that was cut off ends with the completion.
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ProgramReward:
    """A reward function with options: `reward_funcs=ProgramReward(share=True)`. `program_reward` has the defaults.

    Args:
        share: the share of the tests that a program passes. Without it, which is recommended, 1.0 for all of them and
            0.0 for fewer: a share pays programs that answer the easy tests only.
        limits: of the sandbox; `limits.seconds` is for all tests of a program together.
        workers: programs that run at the same time; None, which is recommended, for as many as this process has cores.
        allow_unsandboxed: run programs as yourself, without bubblewrap; read `rewards.code.sandbox` first.
    """

    share: bool = False
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    allow_unsandboxed: bool = False
    needs_no_worker: ClassVar[bool] = True  # see `rewards.workers.pool`: its programs have processes of their own
    __name__ = "program_reward"  # TRL logs a reward under its name

    def __call__(self, completions: list[Completion], **columns: Any) -> list[float | None]:
        """Score completions by the tests of their rows.

        Args:
            completions: strings, or chat completions `[{"role": "assistant", "content": ...}]`; of the latter the last
                message counts. The program is the last block fenced as Python, else the last fenced block, else all.
            columns: the tests, of one kind or of several; the first that a row has counts. For each completion either
                `entry_point`, a function's name, `inputs`, for each test its list of arguments, and `outputs`, for each
                test what is to be returned; or
                `stdin` and `stdout`, for each test a text, of which white space at the end of lines and of the whole
                does not count; or
                `test_list`, for each test a text like "assert f(1) == 2" (see `rewards.code.cases.assert_case`).
                A list may also be the JSON text of one, since columns of data sets hold no mixed types.

        Returns:
            1.0 passed, 0.0 not passed, in between with `share`; None in a row whose columns are None.

        Raises:
            ValueError: there are no such columns, or the tests of a row cannot be judged.
            RuntimeError: no sandbox can be made.
        """
        tests = _read(columns, len(completions))
        programs = [program_of(completion) for completion in completions]
        with ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._score, programs, tests))

    def _score(self, program: str, tests: list[Test] | None) -> float | None:
        if tests is None:
            return None
        if not program.strip():
            return 0.0
        passed = self._passed(program, tests)
        return sum(passed) / len(tests) if self.share else float(all(passed))

    def _passed(self, program: str, tests: list[Test]) -> Iterator[bool]:
        """Test by test: all calls share one run, and each input has one of its own, made when it is asked for."""
        deadline = time.monotonic() + self.limits.seconds
        cases = [test for test in tests if isinstance(test, Case)]
        if cases:
            mark = secrets.token_hex(8)
            job = {"source": program, "mark": mark, "calls": [case.call for case in cases]}
            yield from _judged(cases, mark.encode(), self._run(CALLS, marshal.dumps(job), self.limits.seconds))
        for given, expected in (test for test in tests if not isinstance(test, Case)):
            outcome = self._run(program, given.encode(), deadline - time.monotonic())
            yield outcome.status == "ok" and _lines(outcome.stdout) == _lines(expected.encode())

    def _run(self, source: str, stdin: bytes, seconds: float) -> Outcome:
        if seconds <= 0:
            return Outcome("timeout", b"")
        limits = replace(self.limits, seconds=seconds)
        return run_program(source, stdin=stdin, limits=limits, allow_unsandboxed=self.allow_unsandboxed)


program_reward = ProgramReward()


def program_of(completion: Completion) -> str:
    """The program in a completion; see `ProgramReward.__call__`."""
    text = text_of(completion)
    blocks = _FENCE.findall(text)
    python = [block for block in blocks if block[0].lower() in ("python", "python3", "py")]
    return (python or blocks or [("", text)])[-1][1]


def _read(columns: dict[str, Any], rows: int) -> list[list[Test] | None]:
    """The tests of each row, of the first kind whose columns are not None there."""
    kinds = {names: read for names, read in KINDS.items() if all(name in columns for name in names)}
    if not kinds:
        raise ValueError(
            "Reward 'program_reward' needs the columns 'entry_point', 'inputs' and 'outputs', or 'stdin' and 'stdout', "
            f"or 'test_list'; the data set has: {', '.join(sorted(columns)) or 'none'}."
        )
    tests: list[list[Test] | None] = [None] * rows
    for row in range(rows):
        for names, read in kinds.items():
            values = [columns[name][row] for name in names]
            if tests[row] is None and None not in values:
                try:
                    tests[row] = read(*values)
                except ValueError as error:
                    raise ValueError(f"{', '.join(names)} of completion {row}: {error}") from error
    return tests


def _calls(function: str, inputs: Any, outputs: Any) -> list[Test]:
    pairs = zip(_list(inputs), _list(outputs), strict=True)
    return [returns_case(function, arguments, expected) for arguments, expected in pairs]


def _streams(stdin: Any, stdout: Any) -> list[Test]:
    return list(zip(_list(stdin), _list(stdout), strict=True))


def _asserts(test_list: Any) -> list[Test]:
    return [assert_case(text) for text in _list(test_list)]


def _list(value: Any) -> list[Any]:
    items = json.loads(value) if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise ValueError(f"one or more tests in a list are needed, got {value!r}")
    return items


# The columns that hold tests, and how to read a row of them.
KINDS: dict[tuple[str, ...], Callable[..., list[Test]]] = {
    ("entry_point", "inputs", "outputs"): _calls,
    ("stdin", "stdout"): _streams,
    ("test_list",): _asserts,
}


def _judged(cases: list[Case], mark: bytes, outcome: Outcome) -> list[bool]:
    """Case by case; none if the lines cannot all be of `code.guest.calls`, which marks each and then ends."""
    lines = outcome.stdout.split(b"\n")[:-1]
    too_many = len(lines) > len(cases) - (outcome.status != "ok")
    if too_many or not all(line.startswith(mark) for line in lines):
        return [False] * len(cases)
    lines += [mark] * (len(cases) - len(lines))
    return [_right(case, line.removeprefix(mark)) for case, line in zip(cases, lines, strict=True)]


def _right(case: Case, line: bytes) -> bool:
    try:
        return case.passes(json.loads(line))
    except Exception:  # whatever a program wrote there, it is not the value that was asked for
        return False


def _lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]
