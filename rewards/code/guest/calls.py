"""Runs inside the sandbox, sent there as text: calls a program's functions and writes down what they return.

Standard input: `marshal` of {"source": text, "mark": text, "calls": [`marshal` of (function, arguments, keywords,
wrappers), ...]}. Standard output: a line for each call, the mark and then the value as `written` gives it, or nothing
where the call raised or its value is no plain data. What the right values are is not known here.
"""

import builtins
import marshal
import os
import sys
from collections.abc import Iterable


def main() -> None:
    """Load the program of the job on standard input, make its calls, and write what each returned."""
    job = marshal.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is no result
    program = sys.modules["solution"] = type(sys)("solution")
    exec(compile(job["source"], "solution.py", "exec", dont_inherit=True), vars(program))
    for call in job["calls"]:
        function, arguments, keywords, wrappers = marshal.loads(call)
        try:
            value = eval(function, vars(program))(*arguments, **keywords)
            for name, *more in wrappers:
                value = getattr(builtins, name)(value, *more)
            line = written(value)
        except Exception:
            line = ""
        print(job["mark"] + line, file=results, flush=True)
    os._exit(0)  # threads that still run and exit handlers have nothing to add


def written(value: object) -> str:
    """Plain data as JSON that keeps Python's types; `rewards.code.cases.same` reads it.

    None, booleans and numbers are themselves, text is its UTF-8 in hexadecimal, and everything else a list that starts
    with its kind: `(1, "a")` -> `["tuple",1,"61"]`.

    Raises:
        TypeError: the value, or one in it, is no plain data.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        number = int(value)
        return str(number) if abs(number) < 2**63 else f'["int","{number:x}"]'  # no limit on hexadecimal digits
    if isinstance(value, float):
        return repr(float(value)).replace("inf", "Infinity").replace("nan", "NaN")
    if isinstance(value, complex):
        return f'["complex",{written(value.real)},{written(value.imag)}]'
    if isinstance(value, str):
        return f'"{value.encode("utf-8", "surrogatepass").hex()}"'
    if isinstance(value, bytes | bytearray):
        return f'["bytes","{bytes(value).hex()}"]'
    if isinstance(value, dict):
        pairs = (f"[{written(key)},{written(item)}]" for key, item in value.items())
        return _list("dict", pairs)
    if isinstance(value, list | tuple | set | frozenset):
        kind = "list" if isinstance(value, list) else "tuple" if isinstance(value, tuple) else "set"
        return _list(kind, map(written, value))
    raise TypeError(f"{type(value).__name__} is no plain data")


def _list(kind: str, items: Iterable[str]) -> str:
    return "[" + ",".join((f'"{kind}"', *items)) + "]"


if __name__ == "__main__":
    main()
