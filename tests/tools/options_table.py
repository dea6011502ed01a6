"""The tables of options in grpo_ext/README.md, from the docstring and the defaults of `GRPOExtConfig`.

    python -m tests.tools.options_table        # writes them into the file

An entry of the docstring is `name: text`, or `name, name: text`; its further lines are indented. A field of TRL gets a
row in the first table, with TRL's default; a field of this project gets one in the second.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from trl import GRPOConfig

from grpo_ext import TRL_DEFAULTS, GRPOExtConfig
from grpo_ext.config import DEFAULTS, RESOLVED_DEFAULTS
from tests.tools.paths import ROOT

README = ROOT / "grpo_ext" / "README.md"
FIRST_LINE = "<!-- Generated from GRPOExtConfig: python -m tests.tools.options_table -->\n"
LAST_LINE = "<!-- end of the generated tables -->\n"

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", re.MULTILINE)


def entries() -> dict[tuple[str, ...], str]:
    """What the docstring says about options: names -> text, in its order."""
    names = {field.name for field in fields(GRPOExtConfig)}
    found = {tuple(listed.split(", ")): text for listed, text in _ENTRY.findall(inspect.getdoc(GRPOExtConfig) or "")}
    return {listed: " ".join(text.split()) for listed, text in found.items() if names.issuperset(listed)}


def tables() -> str:
    """Both tables, as Markdown. Options of TRL that DEFAULTS leaves out have a default that depends on the device."""
    own = {field.name: field.default for field in fields(GRPOExtConfig)} | RESOLVED_DEFAULTS
    parents = {field.name for field in fields(GRPOConfig)}
    changed = ["| option of TRL | default | TRL's default | meaning |", "| --- | --- | --- | --- |"]
    added = ["| new option | default | meaning |", "| --- | --- | --- |"]
    for names, text in entries().items():
        if parents.issuperset(names):
            pairs = [(DEFAULTS[name], TRL_DEFAULTS[name]) for name in names if name in DEFAULTS]
            default, before = (_codes(values) for values in zip(*pairs, strict=True)) if pairs else ("by device", "")
            changed.append(_row(_names(names), default, before, text))
        else:
            added.append(_row(_names(names), _codes(own[name] for name in names), text))
    return "\n".join(changed) + "\n\nThese options are new.\n\n" + "\n".join(added) + "\n"


def with_tables(text: str) -> str:
    """The text of the file, with the tables between their two comments."""
    before, _, rest = text.partition(FIRST_LINE)
    _, _, after = rest.partition(LAST_LINE)
    return f"{before}{FIRST_LINE}\n{tables()}\n{LAST_LINE}{after}"


def _names(names):
    return ", ".join(f"`{name}`" for name in names)


def _codes(values):
    return ", ".join(f"`{value!r}`".replace("'", '"') for value in values)


def _row(*cells):
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def write(path: Path = README) -> None:
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
