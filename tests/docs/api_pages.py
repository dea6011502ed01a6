"""The API pages: HTML of the public modules from their docstrings, by pdoc.

    python -m tests.docs.api_pages outputs/docs

Before it writes them, it checks the cross-references in all docstrings of the project, and exits with 1 if one is
broken. A cross-reference is text in backticks that is the path of a module or of something in it
(`grpo_ext.rewards.math.number`), the name of a class (`GRPOExtConfig`, `GRPOExtConfig.beta`) or a source file
(`losses/kl.py`).
"""

import ast
import builtins
import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.tools.paths import ROOT

# What users import. Everything else is reached through these.
PUBLIC_MODULES = (
    "grpo_ext",
    "grpo_ext.rewards",
    "grpo_ext.rewards.logic",
    "grpo_ext.rewards.code.cases",
    "grpo_ext.rewards.code.sandbox",
    "grpo_ext.data",
    "grpo_ext.recipe",
)
# Docstrings mention classes of these.
LIBRARIES = ("trl", "transformers", "peft", "datasets", "huggingface_hub")

DOTTED = re.compile(r"(?:grpo_ext|rewards|recipes)(?:\.\w+)+")
CLASS = re.compile(r"[A-Z]\w*[a-z]\w*(?:\.\w+)?")
FILE = re.compile(r"(?:[\w.-]+/)*\w+\.py")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the project: its name and its syntax tree."""
    for folder in ("grpo_ext", "rewards", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "grpo_ext" else ("grpo_ext", *parts)).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def docstrings() -> Iterator[tuple[str, str]]:
    """Every docstring of the project, with the name of its module."""
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, ast.get_docstring(node) or ""


@functools.cache
def home_of_classes() -> dict[str, str]:
    """The module of every class of the project."""
    return {node.name: name for name, tree in modules() for node in tree.body if isinstance(node, ast.ClassDef)}


def broken_references(module: str, text: str) -> list[str]:
    """The cross-references in a docstring of `module` that lead nowhere."""
    return [reference for reference in re.findall(r"`([^`\n]+)`", text) if not resolves(module, reference)]


def resolves(module: str, reference: str) -> bool:
    """Whether the text in backticks leads to something; True for text that is no cross-reference."""
    if FILE.fullmatch(reference):
        folder = (ROOT / module.replace(".", "/")).parent
        folders = (ROOT, ROOT / "grpo_ext", folder, ROOT / module.replace(".", "/"))
        return any((folder / reference).is_file() for folder in folders)
    if DOTTED.fullmatch(reference):
        return reference.startswith("grpo_ext.") and _has_path(reference)
    if CLASS.fullmatch(reference):
        return any(_has(place, reference) for place in _places(module, reference.partition(".")[0]))
    return True


def _places(module: str, name: str) -> Iterator[ModuleType]:
    """Where a class may be: in the module that mentions it, built in, elsewhere in the project, or in a library."""
    yield importlib.import_module(module)
    yield builtins
    if name in home_of_classes():
        yield importlib.import_module(home_of_classes()[name])
    for library in LIBRARIES:
        yield importlib.import_module(library)


def _has_path(path: str) -> bool:
    """Whether `path` is a module, or something in one. Modules that are scripts are found without running them."""
    parent, _, name = path.rpartition(".")
    if not parent:
        return importlib.util.find_spec(path) is not None
    if not _has_path(parent):
        return False
    try:
        if importlib.util.find_spec(path) is not None:
            return True
    except ModuleNotFoundError:  # the parent is no package
        pass
    return _has(_load(parent), name)


def _load(path: str) -> Any:
    """The module or attribute with this path, which exists."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(_load(parent), name)


def _has(value: Any, path: str) -> bool:
    """Whether `value` has the attribute, or dataclass field, `path`."""
    for name in filter(None, path.split(".")):
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        if not hasattr(value, name):
            return name in fields
        value = getattr(value, name)
    return True


def build(folder: Path) -> None:
    """Write one page per public module, an index, and a search index."""
    import pdoc

    pdoc.docstrings.GOOGLE_LIST_SECTIONS += ["Changed defaults", "Added fields"]  # of the configs
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*PUBLIC_MODULES, output_directory=folder)


def main(folder: str) -> None:
    broken = [f"{module}: `{name}`" for module, text in docstrings() for name in broken_references(module, text)]
    if broken:
        sys.exit("Broken cross-references:\n" + "\n".join(broken))
    build(Path(folder))
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main(sys.argv[1])
