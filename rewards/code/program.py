"""Scores Python programs by running tests, in a sandbox that never contains the expected values.

    program_reward(["```python\\ndef add(a, b): return a + b\\n```"],
                   entry_point=["add"], inputs=[[[1, 2], [3, 4]]], outputs=[[3, 7]])  ->  [1.0]

Each test is a run of its own, with its own time limit: it shares no files, processes or variables with the other tests.
Arguments go into the sandbox, returned values come out, and this process compares them. So a program gains nothing by
patching or reading its surroundings, by printing, or by exiting early: only correct values score.
For what the sandbox stops and what it does not, see `grpo_ext.rewards.code.sandbox`.
"""

import json
import marshal
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from grpo_ext.rewards.code.cases import Case
from grpo_ext.rewards.code.formats import FORMATS, OPTIONAL_COLUMNS, RowTests, read_tests
from grpo_ext.rewards.code.sandbox import Limits, Outcome, Sandbox
from grpo_ext.rewards.completion import Completion, text_of
from grpo_ext.rewards.cores import cores_per_process

_GUEST = Path(__file__).parent / "guest"
RUN_CALLS = (_GUEST / "run_calls.py").read_text(encoding="utf-8")
PRELUDE = (_GUEST / "prelude.py").read_text(encoding="utf-8")
# Modules that the scripts above import, loaded once per sandbox.
CALL_MODULES = ("collections.abc", "marshal")
PRELUDE_MODULES = (
    *("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator"),
    *("random", "re", "string", "typing"),
)

# Language and text of a fenced block. An unclosed block extends to the end of the completion.
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ProgramReward:
    """A reward function with options: `reward_funcs=ProgramReward(share=True)`. `program_reward` has the defaults.

    Args:
        share: True scores the fraction of the tests that a program passes. False (recommended) scores 1.0 if it passes
            all of them and 0.0 otherwise: a fraction rewards programs that solve only the easy tests.
        limits: limits of the sandbox, for each test. The time to start a sandbox does not count.
        total_seconds: running time of all tests of a program together, in seconds. The remaining tests fail.
        prelude: whether to run `guest/prelude.py` before programs that are tested by calls. None (recommended) means
            for rows whose data set needs it: HumanEval, LeetCode (`Solution().f`), and calls in APPS, LiveCodeBench and
            open-r1.
        workers: number of programs that run at the same time. None (recommended) means one per core of this process;
            cores are shared if several processes train.
        allow_unsandboxed: run programs as your own user, without bubblewrap. Read `grpo_ext.rewards.code.sandbox`
            first.
    """

    share: bool = False
    limits: Limits = field(default_factory=Limits)
    total_seconds: float = 60.0
    prelude: bool | None = None
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
            columns: the tests, in one of the formats of `grpo_ext.rewards.code.formats`, of which the first present in
                a row is used. The simplest:
                - `entry_point`: a function's name; `inputs`: one list of arguments per test; `outputs`: one expected
                  value per test.
                - `stdin`, `stdout`: one text per test. White space at the end of lines and of the output is ignored.
                  A float may have a relative error of 1e-9, or of `float_tolerance`, a number per row.
                - `test_list`: one text per test, such as "assert f(1) == 2" (see
                  `grpo_ext.rewards.code.cases.assert_case`).

        Returns:
            One score per completion: 1.0 if passed, 0.0 if failed, a fraction with `share`; None if the columns of the
            row are None.

        Raises:
            ValueError: the data set has none of these columns, or the tests of a row cannot be parsed.
            RuntimeError: the sandbox cannot be started.
        """
        tests = _parse_tests(columns, len(completions))
        programs = [extract_program(completion) for completion in completions]
        with ThreadPoolExecutor(self.workers or cores_per_process()) as pool:
            return list(pool.map(self._score, programs, tests))

    def _score(self, program: str, row: RowTests | None) -> float | None:
        if row is None:
            return None
        if not program.strip():
            return 0.0
        passed = self._run_tests(program, row)
        return sum(passed) / len(row.tests) if self.share else float(all(passed))

    def _run_tests(self, program: str, row: RowTests) -> Iterator[bool]:
        """Whether each test passes, lazily. Each is a run of its own."""
        has_prelude = row.needs_prelude if self.prelude is None else self.prelude
        prelude = PRELUDE if has_prelude else ""
        modules = (*CALL_MODULES, *(PRELUDE_MODULES if has_prelude else ()))
        left = self.total_seconds
        with self._sandbox(program) as streams, self._sandbox(RUN_CALLS, modules) as calls:
            for test in row.tests:
                if left <= 0:
                    yield False
                    continue
                seconds = min(left, self.limits.seconds)
                if isinstance(test, Case):
                    mark = secrets.token_hex(8)
                    job = {"prelude": prelude, "source": program, "mark": mark, "call": test.call}
                    outcome = calls.run(marshal.dumps(job), seconds=seconds)
                    passes = _accepts(test, mark.encode(), outcome)
                else:
                    outcome = streams.run(test.stdin.encode("utf-8", "surrogatepass"), seconds=seconds)
                    passes = outcome.status == "ok" and test.accepts(outcome.stdout)
                left -= outcome.seconds
                yield passes

    def _sandbox(self, source: str, modules: tuple[str, ...] = ()) -> Sandbox:
        return Sandbox(source, limits=self.limits, modules=modules, allow_unsandboxed=self.allow_unsandboxed)


program_reward = ProgramReward()


def extract_program(completion: Completion) -> str:
    """The program in a completion: the last Python block, else the last fenced block, else the whole text."""
    text = text_of(completion)
    blocks = _FENCE.findall(text)
    python = [block for block in blocks if block[0].lower() in ("python", "python3", "py")]
    return (python or blocks or [("", text)])[-1][1]


def _parse_tests(columns: dict[str, Any], rows: int) -> list[RowTests | None]:
    """The tests of each row; None if it has none."""
    if not any(all(name in columns for name in names) for names in FORMATS):
        readable = ", or ".join(" and ".join(map(repr, names)) for names in FORMATS)
        raise ValueError(
            f"Reward 'program_reward' needs the columns {readable}; "
            f"the data set has: {', '.join(sorted(columns)) or 'none'}."
        )
    read = {name for names in FORMATS for name in names} | OPTIONAL_COLUMNS
    tests: list[RowTests | None] = []
    for row in range(rows):
        try:
            tests.append(read_tests({name: columns[name][row] for name in read & columns.keys()}))
        except ValueError as error:
            raise ValueError(f"completion {row}: {error}") from error
    return tests


def _accepts(case: Case, mark: bytes, outcome: Outcome) -> bool:
    """Whether a case passes. `guest/run_calls.py` writes one line, which starts with the mark, and then exits."""
    first, *rest = outcome.stdout.split(b"\n")
    if outcome.status != "ok" or rest != [b""] or not first.startswith(mark):
        return False
    try:
        return case.accepts(json.loads(first.removeprefix(mark)))
    except Exception:  # a line that cannot be decoded is not the expected value
        return False
