"""The pages: code blocks are run or parsed, links, paths and flags exist, and the table of options is current."""

import ast
import inspect
import json
import re
import textwrap
import tomllib
from argparse import ArgumentParser
from dataclasses import fields
from importlib import import_module

import pytest
import yaml
from trl import GRPOConfig

from grpo_ext import GRPOExtConfig, cli, parts
from grpo_ext.config import DEFAULTS
from tests.tools import markdown, options_table, shell_lines
from tests.tools.models import random_lora
from tests.tools.paths import ROOT
from tests.tools.training import log_of

PAGES = markdown.pages()
FOLDERS = ("grpo_ext", "rewards", "recipes", "tests")
NAMES_OF_FILES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


# Code blocks


def python_faults(text):
    """What is wrong with Python code: its syntax, imports of names that do not exist, arguments that a callable does
    not have."""
    try:
        tree = ast.parse(textwrap.dedent(text))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    found, names = [], {}
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [(alias.name, None, alias) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [(node.module, alias.name, alias) for alias in node.names]
        for module, name, alias in imported:
            try:
                value = import_module(module)
                names[alias.asname or alias.name] = value if name is None else getattr(value, name)
            except (ImportError, AttributeError) as error:
                found.append(str(error))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            signature = inspect.signature(names[node.func.id])
            try:
                signature.bind_partial(**{keyword.arg: None for keyword in node.keywords if keyword.arg})
            except TypeError as error:
                found.append(f"{node.func.id}: {error}")
    return found


def diff_faults(text):
    """What is wrong with either side of a diff of Python code."""
    sides = {side: [line[1:] for line in text.splitlines() if line[:1] in (side, " ")] for side in "-+"}
    return [fault for lines in sides.values() for fault in python_faults("\n".join(lines))]


def faults_of(parse):
    def faults(text):
        try:
            parse(text)
        except Exception as error:
            return [repr(error)]
        return []

    return faults


def bibtex_faults(text):
    entry = re.fullmatch(r"@\w+\{\w+,\n(?:  \w+ = \{.*\},\n)+\}\n", text)
    return [] if entry and text.count("{") == text.count("}") else ["not an entry"]


LANGUAGES = {
    "bash": shell_lines.faults,
    "": shell_lines.faults,
    "python": python_faults,
    "diff": diff_faults,
    "yaml": faults_of(lambda text: list(yaml.safe_load_all(text))),
    "json": faults_of(json.loads),
    "toml": faults_of(tomllib.loads),
    "bibtex": bibtex_faults,
    "text": lambda text: [],  # what a command prints
}


def block_faults(text):
    """What is wrong with the code blocks of a page."""
    found = []
    for block in markdown.blocks(text):
        check = LANGUAGES.get(block.language, lambda _: ["unknown language"])
        found += [f"block at line {block.line} ({block.language}): {fault}" for fault in check(block.text)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_can_be_run(page):
    """A command with a flag that was renamed, or an example with an import that moved, fails at the reader's."""
    text = read(page)
    assert text.count("\n```") + text.startswith("```") == 2 * len(markdown.blocks(text))  # none is overlooked
    assert not block_faults(text)


WRONG = {
    "target": ("bash", "make maths"),
    "flag of a benchmark": ("bash", 'make bench ARGS="--quickly"'),
    "command": ("bash", "grpo-ext trian math"),
    "flag of a command": ("bash", "grpo-ext plan --model NAME --gpu 8GB --generation_count 8"),
    "missing argument": ("bash", "grpo-ext plan --gpu 8GB"),
    "flag of a recipe": ("bash", "grpo-ext train math --max_stepz 3"),
    "setting": ("bash", "grpo-ext train math --loss_type grpo_sequences"),
    "preset": ("bash", "grpo-ext train math --config gpu_9gb.yaml"),
    "recipe": ("bash", "cd recipes && accelerate launch recipes/maths.py"),
    "flag of a launched recipe": ("bash", "accelerate launch recipes/math.py --max_stepz 3"),
    "flag of the launcher": ("bash", "accelerate launch --num_procs 2 recipes/math.py"),
    "launcher's file": ("bash", "accelerate launch --config_file accelerate_configs/tpu.yaml recipes/math.py"),
    "module": ("bash", "python -m grpo_ext.recipes.maths"),
    "script": ("bash", "python recipes/tiny_math/built.py"),
    "flag of a script": ("bash", "python recipes/tiny_math/build.py --step 3"),
    "file of tests": ("bash", ".venv/bin/pytest tests/engines"),
    "extra": ("bash", 'pip install "grpo-ext[logics]"'),
    "program": ("bash", "frobnicate --all"),
    "continued line": ("bash", "grpo-ext train math \\\n    --max_stepz 3"),
    "no language": ("", "$ make math"),
    "unknown language": ("cobol", "STOP RUN."),
    "syntax": ("python", "GRPOExtTrainer(args=args, ...)"),
    "import": ("python", "from grpo_ext.rewards import maths_answer_reward"),
    "argument": ("python", "from grpo_ext import GRPOExtConfig\nGRPOExtConfig(chunk_token=4096)"),
    "side of a diff": ("diff", "-from trl import GRPOConfig\n+from grpo_ext import GRPOExtConfiguration"),
    "yaml": ("yaml", "a: [1"),
    "json": ("json", "{'a': 1}"),
    "bibtex": ("bibtex", "@software{grpo_ext,\n  title = {grpo-ext,\n}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_block_that_cannot_be_run_is_found(case):
    """A check that accepts everything would keep no page current."""
    language, text = WRONG[case]
    assert len(block_faults(f"# Title\n\n```{language}\n{text}\n```\n")) == 1


# Links, paths and flags in sentences


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_exist(page):
    text = read(page)
    files = set(re.findall(r"(?<![\w/.])((?:grpo_ext|rewards|recipes|tests|accelerate_configs)/[\w./-]*\w)", text))
    assert not [path for path in files if not (ROOT / path).exists()]
    assert not markdown.broken_links(ROOT / page)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """`rollout/types.py` is a path from the folder of the page, from the root, or from grpo_ext/; `types.py` alone is
    the name of a file anywhere."""
    folders = ((ROOT / page).parent, ROOT, ROOT / "grpo_ext")
    named = {code for code in markdown.code_in_sentences(read(page)) if re.fullmatch(r"[\w*./-]+\.py", code)}
    missing = [name for name in named if not any(list(folder.glob(name)) for folder in folders)]
    missing = [name for name in missing if "/" in name or name not in NAMES_OF_FILES]
    assert not missing


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](page.md#one-two) [c](https://example.org) `[d](none)`\n")
    assert markdown.broken_links(page) == []
    page.write_text("# One\n[a](#two) ![b](none.png) [c](page.md#two)\n")
    assert markdown.broken_links(page) == ["#two", "none.png", "page.md#two"]


@pytest.fixture(scope="module")
def flags():
    """Every flag of the commands, recipes, scripts and launchers that a page may name in a sentence."""
    found = {"--help"}
    for name in cli.COMMANDS:
        parser = ArgumentParser()
        import_module(f"grpo_ext.cli.{name}").add_arguments(parser)
        found |= {flag for action in parser._actions for flag in action.option_strings}
    for name in shell_lines.RECIPES:
        found |= shell_lines.flags_of_recipe(name)
    for folder in ("tests/benchmarks", "tests/gpu", "recipes/tiny_math"):
        for path in (ROOT / folder).glob("*.py"):
            found |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    return found | set(shell_lines.FLAGS_OF_THE_LAUNCHER)


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_sentences_exist(page, flags):
    named = set()
    for code in markdown.code_in_sentences(read(page)):
        if re.match(r"--|grpo-ext |accelerate launch ", code):
            named |= set(re.findall(r"(?<!\S)--[\w-]+", code))
    assert not named - flags


# The README's example, and the table of options


def test_the_table_of_options_is_current():
    """After a change of the docstring or a default: python -m tests.tools.options_table"""
    text = options_table.README.read_text(encoding="utf-8")
    assert text == options_table.with_tables(text)


def test_every_option_is_documented_once():
    own = {field.name for field in fields(GRPOExtConfig)} - {field.name for field in fields(GRPOConfig)}
    listed = [name for names in options_table.entries() for name in names]
    assert len(listed) == len(set(listed))
    assert own | set(DEFAULTS) <= set(listed)


def test_the_stage_of_the_contributors_guide_works(build, small_model, monkeypatch):
    """As printed, with one line in the list of stages and one field in the config."""
    (code,) = re.findall(r"```python\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    names = {}
    exec(code, names)
    monkeypatch.setattr(parts, "STAGES", (*parts.STAGES, names["SampleAgain"]))
    monkeypatch.setattr(GRPOExtConfig, "sample_again", True, raising=False)
    sampled = []

    def dead_at_first(completions, **columns):
        sampled.append(len(completions))
        return [0.0 if len(sampled) == 1 else float(i % 2) for i in range(len(completions))]

    trainer = build(small_model, reward=dead_at_first, peft_config=random_lora(), max_steps=2)
    trainer.train()
    assert sampled == [8, 8, 8]  # twice in the first step, once in the second
    assert log_of(trainer, "frac_dead_groups") == [0.0, 0.0]
