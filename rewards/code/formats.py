"""Reads the tests of a row, in the format of its data set.

    read_tests({"test_list": ["assert f(1) == 2"]})            ->  RowTests with one call
    read_tests({"input_output": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'})  ->  RowTests with one standard input

| columns | data sets or content |
| --- | --- |
| `entry_point`, `inputs`, `outputs` | a function, one list of arguments and one expected value per test |
| `stdin`, `stdout`; optionally `float_tolerance` | one text, or list of lines, per test |
| `test_list` | MBPP: asserts |
| `input_output` | APPS, TACO |
| `public_test_cases`; `private_test_cases`, `metadata` | LiveCodeBench |
| `public_tests`; `private_tests`, `generated_tests` | CodeContests: all of its tests |
| `verification_info` | open-r1 |
| `test`, `entry_point` | HumanEval and LeetCode: `def check(candidate)` with asserts |
| `test` | KodCode: pytest functions with asserts |

Lists and dicts may be JSON text. The first format whose columns are present, and not None, is used. A row with a test
that cannot be converted into a call or a standard input is refused as a whole: without that test, wrong programs could
pass.
"""

import ast
import base64
import contextlib
import copy
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo_ext.rewards.code.cases import Case, assert_case, returns_any_case, returns_case
from grpo_ext.rewards.code.streams import StreamTest

Test = Case | StreamTest


@dataclass(frozen=True)
class RowTests:
    """The tests of a row.

    Args:
        tests: at least one.
        needs_prelude: whether the data set runs its solutions after the imports of `guest/prelude.py`.
    """

    tests: list[Test]
    needs_prelude: bool = False


def read_tests(row: dict[str, Any]) -> RowTests | None:
    """The tests of a row; None if it has none.

    Args:
        row: value per column.

    Raises:
        ValueError: the tests cannot be read. The message has the columns and what to write instead.
    """
    for columns, read in FORMATS.items():
        if all(row.get(column) is not None for column in columns):
            try:
                tests = read(row)
                if not tests.tests:
                    raise ValueError("there are no tests; expected a list of one or more tests")
            except (ValueError, TypeError, KeyError, AttributeError, SyntaxError) as error:
                raise ValueError(f"{', '.join(columns)}: {_message(error)}") from error
            return tests
    return None


def _message(error: Exception) -> str:
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error)


def _own_calls(row: dict[str, Any]) -> RowTests:
    function = row["entry_point"]
    pairs = zip(_listed(row["inputs"]), _listed(row["outputs"]), strict=True)
    tests: list[Test] = [returns_case([function], arguments, expected) for arguments, expected in pairs]
    return RowTests(tests, "." in function)


def _own_streams(row: dict[str, Any]) -> RowTests:
    return RowTests(_stream_tests(row["stdin"], row["stdout"], row.get("float_tolerance")))


def _asserts(row: dict[str, Any]) -> RowTests:
    lines = _listed(row["test_list"])
    return RowTests([assert_case(line) for line in lines], any("Solution(" in line for line in lines))


def _apps(row: dict[str, Any]) -> RowTests:
    tests = _parsed(row["input_output"])
    function = tests.get("fn_name")
    if not function:
        return RowTests(_stream_tests(tests["inputs"], tests["outputs"]))
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    return RowTests([_apps_call(function, *pair) for pair in pairs], needs_prelude=True)


def _live_code_bench(row: dict[str, Any]) -> RowTests:
    cases = _parsed(row["public_test_cases"]) + _private_tests(row.get("private_test_cases"))
    function = (_parsed(row["metadata"]) if row.get("metadata") else {}).get("func_name")
    tests: list[Test] = []
    for case in cases:
        if case.get("testtype", "stdin") == "stdin":
            tests.append(StreamTest(stdin=case["input"], stdout=case["output"]))
        elif not function:
            raise ValueError("metadata has no 'func_name', which functional tests need")
        else:
            arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
            tests.append(returns_case(_function_or_method(function), arguments, json.loads(case["output"])))
    return RowTests(tests, bool(function))


def _private_tests(value: Any) -> list[dict[str, str]]:
    """The private tests of LiveCodeBench: JSON, which its files compress as the pickle of a text."""
    if not value:
        return []
    with contextlib.suppress(ValueError):
        return list(_parsed(value))
    try:
        return list(json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()))
    except Exception as error:  # zlib and pickle raise many types
        raise ValueError(f"private_test_cases is neither JSON nor a compressed pickle of JSON text: {error}") from error


class _TextUnpickler(pickle.Unpickler):
    """Reads plain data only: a pickle could otherwise run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the private tests refer to {module}.{name}; expected a text")


def _code_contests(row: dict[str, Any]) -> RowTests:
    tests: list[Test] = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        group = _parsed(row[column]) if row.get(column) else {}
        if group.get("input"):
            tests += _stream_tests(group["input"], group["output"])
    return RowTests(tests)


def _open_r1(row: dict[str, Any]) -> RowTests:
    info = _parsed(row["verification_info"])
    if info.get("language", "python") != "python":
        raise ValueError(f"the language is {info['language']!r}; the reward runs Python only. Leave the row out.")
    tests: list[Test] = []
    for case in info["test_cases"]:
        if case.get("fn_name"):
            tests.append(_apps_call(case["fn_name"], _parsed(case["input"]), _parsed(case["output"])))
        else:
            tests += _stream_tests([case["input"]], [case["output"]])
    return RowTests(tests, any(isinstance(test, Case) for test in tests))


def _human_eval(row: dict[str, Any]) -> RowTests:
    function = ast.parse(row["entry_point"].strip(), mode="eval").body
    check: ast.FunctionDef | None = None
    for node in ast.parse(row["test"]).body:
        match node:
            case ast.FunctionDef(name="check", args=ast.arguments(args=[_])) if check is None:
                check = node
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"), args=[ast.Name() | ast.Attribute()], keywords=[])):
                pass  # the call of the function above
            case _ if not _is_setup(node):
                raise _cannot_convert(node)
    if check is None:
        raise ValueError(f"there is no 'def check(candidate)'. {_HOW_TO_WRITE_ASSERTS}")
    return RowTests(list(_converted(check.body, {check.args.args[0].arg: function})), needs_prelude=True)


def _kod_code(row: dict[str, Any]) -> RowTests:
    tests: list[Test] = []
    for node in ast.parse(row["test"]).body:
        match node:
            case ast.FunctionDef(name=name, args=ast.arguments(args=[]), body=body, decorator_list=[]) if (
                name.startswith("test")
            ):
                tests += _converted(body, {})
            case _ if not _is_setup(node):
                raise _cannot_convert(node)
    return RowTests(tests)


def _is_setup(node: ast.stmt) -> bool:
    """Whether a statement outside a test function only prepares tests: an import, an assignment or a docstring."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Assign(targets=[ast.Name()]) | ast.Expr(value=ast.Constant()):
            return True
    return False


MAX_REPETITIONS = 1000  # of a loop over constants
_HOW_TO_WRITE_ASSERTS = (
    "Give the row `test_list` instead: a list of asserts as strings, each of which calls the function by its name "
    "and compares with a constant, as in 'assert f([1, 2]) == 3'; or leave the row out."
)


def _cannot_convert(node: ast.AST) -> ValueError:
    return ValueError(f"{ast.unparse(node)[:200]!r} cannot be converted into a call. {_HOW_TO_WRITE_ASSERTS}")


def _converted(body: list[ast.stmt], names: dict[str, ast.expr]) -> Iterator[Case]:
    """The asserts of a test function, with names replaced by the expressions assigned to them.

    A loop over constants becomes one assert per constant.

    Args:
        body: statements of the function.
        names: expression per name; the assignments in the body are added.
    """
    for node in body:
        match node:
            case ast.Expr(value=ast.Constant() | ast.Name()) | ast.Pass() | ast.Assert(test=ast.Constant(value=True)):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = _substituted(value, names)
            case ast.For(target=ast.Name(id=name), iter=values, body=inner, orelse=[]) if not any(
                isinstance(part, ast.For) for part in inner
            ):
                for item in _constants(node, _substituted(values, names)):
                    names[name] = item
                    yield from _converted(inner, names)
            case ast.Assert(test=test):
                try:
                    case = assert_case(ast.unparse(ast.Assert(test=_substituted(test, names))))
                except ValueError as error:
                    raise ValueError(f"{error} {_HOW_TO_WRITE_ASSERTS}") from error
                yield case
            case _:
                raise _cannot_convert(node)


def _constants(loop: ast.For, values: ast.expr) -> list[ast.expr]:
    """The constants that a loop iterates over: the items of a list, a tuple or a range."""
    match values:
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return items
        case ast.Call(func=ast.Name(id="range"), args=bounds, keywords=[]):
            try:
                numbers = range(*map(ast.literal_eval, bounds))
            except (ValueError, TypeError):
                raise _cannot_convert(loop) from None
            if not numbers[MAX_REPETITIONS:]:  # len() of a huge range raises
                return [ast.parse(str(number), mode="eval").body for number in numbers]
    raise _cannot_convert(loop)


def _substituted(node: ast.expr, names: dict[str, ast.expr]) -> ast.expr:
    """A copy of an expression with other expressions in place of names."""
    expression: ast.expr = _Substitute(names).visit(copy.deepcopy(node))
    return expression


class _Substitute(ast.NodeTransformer):
    def __init__(self, names: dict[str, ast.expr]):
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._names.get(node.id, node)


def _function_or_method(name: str) -> list[str]:
    """Expressions for a method of the program's class Solution, or else for its function."""
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not the name of a function")
    return [f"Solution().{name}", name]


def _apps_call(function: str, arguments: Any, expected: Any) -> Case:
    """A call in APPS, which may wrap the expected value in a list of one."""
    values = [expected, expected[0]] if isinstance(expected, list) and len(expected) == 1 else [expected]
    return returns_any_case(_function_or_method(function), arguments, values)


def _stream_tests(stdin: Any, stdout: Any, tolerance: float | None = None) -> list[Test]:
    return [
        StreamTest(stdin=_text(given), stdout=_text(expected), tolerance=tolerance)
        for given, expected in zip(_listed(stdin), _listed(stdout), strict=True)
    ]


def _text(value: Any) -> str:
    """A standard input or output: a text, or a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"a standard input or output must be a text or a list of lines; got {value!r}")
    return value


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _listed(value: Any) -> list[Any]:
    items = _parsed(value)
    if not isinstance(items, list) or not items:
        raise ValueError(f"expected a list of one or more tests; got {value!r}")
    return items


# The columns of each format that a row must have, and the function that reads it.
FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any]], RowTests]] = {
    ("entry_point", "inputs", "outputs"): _own_calls,
    ("stdin", "stdout"): _own_streams,
    ("test_list",): _asserts,
    ("input_output",): _apps,
    ("public_test_cases",): _live_code_bench,
    ("public_tests",): _code_contests,
    ("verification_info",): _open_r1,
    ("test", "entry_point"): _human_eval,
    ("test",): _kod_code,
}
# Columns that a format also reads if they are present.
OPTIONAL_COLUMNS = {"float_tolerance", "generated_tests", "metadata", "private_test_cases", "private_tests"}
