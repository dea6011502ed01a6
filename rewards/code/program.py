"""Scores Python programs by running tests, in a sandbox that never contains the expected values.

    program_reward(["```python\\ndef add(a, b): return a + b\\n```"],
                   entry_point=["add"], inputs=[[[1, 2], [3, 4]]], outputs=[[3, 7]])  ->  [1.0]

Arguments go into the sandbox, returned values come out, and this process compares them. So a program gains nothing by
patching or reading its surroundings, by printing, or by exiting early: only correct values score.
For what the sandbox stops and what it does not, see `grpo_ext.rewards.code.sandbox`.
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

from grpo_ext.rewards.code.cases import Case, assert_case, returns_case
from grpo_ext.rewards.code.sandbox import Limits, Outcome, run_program
from grpo_ext.rewards.completion import Completion, text_of

# A test is a function call, or a pair of standard input and expected standard output.
Test = Case | tuple[str, str]

RUN_CALLS = (Path(__file__).parent / "guest" / "run_calls.py").read_text(encoding="utf-8")

# Language and text of a fenced block. An unclosed block extends to the end of the completion.
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ProgramReward:
    """A reward function with options: `reward_funcs=ProgramReward(share=True)`. `program_reward` has the defaults.

    Args:
        share: True scores the fraction of the tests that a program passes. False (recommended) scores 1.0 if it passes
            all of them and 0.0 otherwise: a fraction rewards programs that solve only the easy tests.
        limits: limits of the sandbox. `limits.seconds` applies to all tests of a program together.
        workers: number of programs that run at the same time. None (recommended) means one per core of this process.
        allow_unsandboxed: run programs as your own user, without bubblewrap. Read `grpo_ext.rewards.code.sandbox`
            first.
    """

    share: bool = False
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    allow_unsandboxed: bool = False
    # See `grpo_ext.rewards.workers.pool`. Programs are separate processes already.
    scores_independently: ClassVar[bool] = True
    runs_in_process: ClassVar[bool] = True
    __name__ = "program_reward"  # TRL logs the reward under this name

    def __call__(self, completions: list[Completion], **columns: Any) -> list[float | None]:
        """Score completions by the tests of their rows.

        Args:
            completions: strings or chat completions, `[{"role": "assistant", "content": ...}]`. The last message of a
                chat completion counts. The program is the last block fenced as Python, else the last fenced block, else
                the whole text.
            columns: the tests, in one or more of the following kinds. The first kind present in a row is used.
                - `entry_point`: a function's name; `inputs`: one list of arguments per test; `outputs`: one expected
                  value per test.
                - `stdin`, `stdout`: one text per test. White space at the end of lines and of the output is ignored.
                - `test_list`: one text per test, such as "assert f(1) == 2" (see
                  `grpo_ext.rewards.code.cases.assert_case`).
                A list may also be given as JSON text, since a column of a data set holds values of one type.

        Returns:
            One score per completion: 1.0 if passed, 0.0 if failed, a fraction with `share`; None if the columns of the
            row are None.

        Raises:
            ValueError: the data set has none of these columns, or the tests of a row cannot be parsed.
            RuntimeError: the sandbox cannot be started.
        """
        tests = _parse_tests(columns, len(completions))
        programs = [extract_program(completion) for completion in completions]
        with ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._score, programs, tests))

    def _score(self, program: str, tests: list[Test] | None) -> float | None:
        if tests is None:
            return None
        if not program.strip():
            return 0.0
        passed = self._run_tests(program, tests)
        return sum(passed) / len(tests) if self.share else float(all(passed))

    def _run_tests(self, program: str, tests: list[Test]) -> Iterator[bool]:
        """Whether each test passes. All calls share one run; each pair of streams gets a run of its own, lazily."""
        deadline = time.monotonic() + self.limits.seconds
        cases = [test for test in tests if isinstance(test, Case)]
        if cases:
            mark = secrets.token_hex(8)
            job = {"source": program, "mark": mark, "calls": [case.call for case in cases]}
            yield from _check_lines(cases, mark.encode(), self._run(RUN_CALLS, marshal.dumps(job), self.limits.seconds))
        for given, expected in (test for test in tests if not isinstance(test, Case)):
            outcome = self._run(program, given.encode(), deadline - time.monotonic())
            yield outcome.status == "ok" and _stripped_lines(outcome.stdout) == _stripped_lines(expected.encode())

    def _run(self, source: str, stdin: bytes, seconds: float) -> Outcome:
        if seconds <= 0:
            return Outcome("timeout", b"")
        limits = replace(self.limits, seconds=seconds)
        return run_program(source, stdin=stdin, limits=limits, allow_unsandboxed=self.allow_unsandboxed)


program_reward = ProgramReward()


def extract_program(completion: Completion) -> str:
    """The program in a completion: the last Python block, else the last fenced block, else the whole text."""
    text = text_of(completion)
    blocks = _FENCE.findall(text)
    python = [block for block in blocks if block[0].lower() in ("python", "python3", "py")]
    return (python or blocks or [("", text)])[-1][1]


def _parse_tests(columns: dict[str, Any], rows: int) -> list[list[Test] | None]:
    """The tests of each row, from the first kind whose columns are not None in it; None if there is no such kind."""
    kinds = {names: parse for names, parse in TEST_KINDS.items() if all(name in columns for name in names)}
    if not kinds:
        raise ValueError(
            "Reward 'program_reward' needs the columns 'entry_point', 'inputs' and 'outputs', or 'stdin' and 'stdout', "
            f"or 'test_list'; the data set has: {', '.join(sorted(columns)) or 'none'}."
        )
    tests: list[list[Test] | None] = [None] * rows
    for row in range(rows):
        for names, parse in kinds.items():
            values = [columns[name][row] for name in names]
            if tests[row] is None and None not in values:
                try:
                    tests[row] = parse(*values)
                except ValueError as error:
                    raise ValueError(f"{', '.join(names)} of completion {row}: {error}") from error
    return tests


def _call_tests(function: str, inputs: Any, outputs: Any) -> list[Test]:
    pairs = zip(_parse_list(inputs), _parse_list(outputs), strict=True)
    return [returns_case(function, arguments, expected) for arguments, expected in pairs]


def _stream_tests(stdin: Any, stdout: Any) -> list[Test]:
    return list(zip(_parse_list(stdin), _parse_list(stdout), strict=True))


def _assert_tests(test_list: Any) -> list[Test]:
    return [assert_case(text) for text in _parse_list(test_list)]


def _parse_list(value: Any) -> list[Any]:
    items = json.loads(value) if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise ValueError(f"expected a list of one or more tests; got {value!r}")
    return items


# The columns that hold tests, and the function that parses a row of them.
TEST_KINDS: dict[tuple[str, ...], Callable[..., list[Test]]] = {
    ("entry_point", "inputs", "outputs"): _call_tests,
    ("stdin", "stdout"): _stream_tests,
    ("test_list",): _assert_tests,
}


def _check_lines(cases: list[Case], mark: bytes, outcome: Outcome) -> list[bool]:
    """Whether each case passes; False for all if any line cannot come from `grpo_ext.rewards.code.guest.run_calls`.

    That script starts each line with the secret mark, prints one line per call, and then exits.
    """
    lines = outcome.stdout.split(b"\n")[:-1]
    too_many = len(lines) > len(cases) - (outcome.status != "ok")
    if too_many or not all(line.startswith(mark) for line in lines):
        return [False] * len(cases)
    lines += [mark] * (len(cases) - len(lines))
    return [_accepts(case, line.removeprefix(mark)) for case, line in zip(cases, lines, strict=True)]


def _accepts(case: Case, line: bytes) -> bool:
    try:
        return case.accepts(json.loads(line))
    except Exception:  # a line that cannot be decoded is not the expected value
        return False


def _stripped_lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]
