"""Sandbox script: calls a function of a program and prints what it returns. Sent into the sandbox as text.

Standard input: `marshal` of {"prelude": str, "source": str, "mark": str, "call": bytes}; the call is `marshal` of
(functions, arguments, keywords, wrappers). `functions` is like {"Solution": "Solution().solve"}: the first expression
whose name the program defines is called.
Standard output: one line, the mark followed by the value encoded by `encode_value`. If the program defines none of the
names, or the call raised, or its value is not plain data, there is no line.

The expected values never enter the sandbox.
"""

import builtins
import marshal
import os
import sys
from collections.abc import Iterable


def main() -> None:
    """Load the program from standard input, make its call, and print the value."""
    job = marshal.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the program's own output is not a result
    program = sys.modules["solution"] = type(sys)("solution")
    functions, arguments, keywords, wrappers = marshal.loads(job["call"])
    exec(job["prelude"], vars(program))
    for name in functions:
        vars(program).pop(name, None)  # the program has to define it
    exec(compile(job["source"], "solution.py", "exec", dont_inherit=True), vars(program))
    function = next(function for name, function in functions.items() if name in vars(program))  # builtins do not count
    value = eval(function, vars(program))(*arguments, **keywords)
    for name, *more in wrappers:
        value = getattr(builtins, name)(value, *more)
    print(job["mark"] + encode_value(value), file=results, flush=True)
    os._exit(0)  # skips exit handlers and running threads


def encode_value(value: object) -> str:
    """Encode plain data as JSON that keeps Python's types; `grpo_ext.rewards.code.values.values_equal` decodes it.

    None, booleans and numbers stay as they are. Text becomes its UTF-8 bytes in hexadecimal. Everything else becomes a
    list that starts with its type: `(1, "a")` -> `["tuple",1,"61"]`.

    Raises:
        TypeError: the value, or an item of it, is not plain data.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        number = int(value)
        return str(number) if abs(number) < 2**63 else f'["int","{number:x}"]'  # Python limits decimal digits only
    if isinstance(value, float):
        return repr(float(value)).replace("inf", "Infinity").replace("nan", "NaN")
    if isinstance(value, complex):
        return f'["complex",{encode_value(value.real)},{encode_value(value.imag)}]'
    if isinstance(value, str):
        return f'"{value.encode("utf-8", "surrogatepass").hex()}"'
    if isinstance(value, bytes | bytearray):
        return f'["bytes","{bytes(value).hex()}"]'
    if isinstance(value, dict):
        pairs = (f"[{encode_value(key)},{encode_value(item)}]" for key, item in value.items())
        return _encode_items("dict", pairs)
    if isinstance(value, list | tuple | set | frozenset):
        kind = "list" if isinstance(value, list) else "tuple" if isinstance(value, tuple) else "set"
        return _encode_items(kind, map(encode_value, value))
    raise TypeError(f"{type(value).__name__} is not plain data")


def _encode_items(kind: str, items: Iterable[str]) -> str:
    return "[" + ",".join((f'"{kind}"', *items)) + "]"


if __name__ == "__main__":
    main()
