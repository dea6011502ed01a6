"""What is wrong with a line of a shell block, without running it.

fault("make maths")                        ->  "no target of the Makefile: maths"
fault("grpo-ext plan --gpu 8GB")           ->  "... the following arguments are required: --model"
fault("grpo-ext train math --seed 7")      ->  None
"""

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from trl import TrlParser

from grpo_ext import GRPOExtConfig, cli
from grpo_ext.cli.train import RECIPES
from grpo_ext.model.load import PolicyConfig
from grpo_ext.recipe import RecipeArguments, parse_arguments
from tests.tools.paths import ROOT

FLAGS_OF_THE_LAUNCHER = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
PYTEST_FLAGS = {"-k", "-m", "-n", "-q", "-rP"}
SUBCOMMANDS = {
    "git": {"clone", "pull", "tag", "push"},
    "apt": {"install", "update"},
    "apt-get": {"install", "update"},
    "docker": {"build", "run"},
}


class Fault(Exception):
    """What is wrong with a line."""


def faults(text: str) -> list[str]:
    """What is wrong with the lines of a block, each with the line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [f"{line.strip()}: {found}" for line in lines for found in [fault(line)] if found]


def fault(line: str) -> str | None:
    """What is wrong with a line, or None."""
    try:
        for command in _commands(line):
            _check(command)
    except (Fault, SystemExit, ValueError) as error:
        return str(error)
    return None


def _commands(line: str) -> list[list[str]]:
    """`sudo A=1 x y && z  # why`  ->  [["x", "y"], ["z"]]"""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word and set(word) <= set("&|;"):
            commands.append([])
        elif commands[-1] or not (word == "sudo" or re.fullmatch(r"\w+=.*", word)):
            commands[-1].append(word)
    return [command for command in commands if command]


def _check(command: list[str]) -> None:
    program, words = Path(command[0]).name, command[1:]
    if program in SUBCOMMANDS:
        if not words or words[0] not in SUBCOMMANDS[program]:
            raise Fault(f"unknown: {program} {' '.join(words[:1])}")
    elif program not in PROGRAMS:
        raise Fault(f"unknown program: {program}")
    else:
        PROGRAMS[program](words)


# Programs of the project


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    for target in targets:
        if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
            raise Fault(f"no target of the Makefile: {target}")
    for word in words:
        name, _, value = word.partition("=")
        if name == "ARGS":
            (program,) = re.findall(rf"^{targets[0]}:.*\n\t(.*) \$\(ARGS\)$", makefile, re.MULTILINE)
            if program.startswith("$(BIN)/python "):
                _python([*program.split()[1:], *shlex.split(value)])
            else:
                _pytest(shlex.split(value))


def _grpo_ext(words: list[str]) -> None:
    if not words or words[0] not in cli.COMMANDS:
        raise Fault(f"no command of grpo-ext: {' '.join(words[:1])}")
    name, rest = words[0], words[1:]
    parser = argparse.ArgumentParser(prog=f"grpo-ext {name}")
    import_module(f"grpo_ext.cli.{name}").add_arguments(parser)
    options = _parsed(parser, rest)
    if name == "train" and options is not None:
        if options.what in RECIPES:
            _recipe(options.what, options.flags)
        else:  # data, for the recipe that fits
            _recipe("math", ["--dataset_name", options.what, *options.flags])


def _recipe(name: str, flags: list[str]) -> None:
    """The flags as the recipe reads them, with every check of the settings."""
    said, folder = io.StringIO(), str(ROOT / "recipes")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parse_arguments(flags, name, folder, embedded=f"tiny_{name}.yaml", arguments=_arguments_of(name))
    except SystemExit as error:
        if error.code not in (0, None):
            raise Fault((said.getvalue().strip() or str(error)).splitlines()[-1]) from None


def _arguments_of(name: str) -> type[RecipeArguments]:
    """What a recipe adds to the flags: the most special class of its module."""
    values = vars(import_module(f"grpo_ext.recipes.{name}")).values()
    kinds = [value for value in values if isinstance(value, type) and issubclass(value, RecipeArguments)]
    return max(kinds, key=lambda kind: len(kind.__mro__))


def flags_of_recipe(name: str) -> set[str]:
    """Every flag of a recipe."""
    parser = TrlParser((_arguments_of(name), GRPOExtConfig, PolicyConfig))
    return {flag for action in parser._actions for flag in action.option_strings} | {"--config"}


def _accelerate(words: list[str]) -> None:
    if words[:1] == ["config"]:
        return
    if words[:1] != ["launch"]:
        raise Fault(f"unknown: accelerate {' '.join(words[:1])}")
    options = _parsed(launch_command_parser(), words[1:])
    if options is None:
        return
    if options.config_file and not (ROOT / options.config_file).is_file():
        raise Fault(f"no such file: {options.config_file}")
    script = options.training_script
    if options.module:
        _module(script)
    elif not (ROOT / script).is_file():
        raise Fault(f"no such file: {script}")
    name = script.rpartition(".")[2] if options.module else Path(script).stem
    if name in RECIPES:
        _recipe(name, options.training_script_args)


def _python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        _pytest(words[2:])
    elif words[:1] == ["-m"]:
        folder = Path(_module(words[1])).parent
        _flags_of_scripts(folder, words[2:])
    else:
        script = ROOT / words[0]
        if not script.is_file():
            raise Fault(f"no such file: {words[0]}")
        _flags_of_scripts(script.parent, words[1:])


def _module(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise Fault(f"no such module: {name}")
    return spec.origin


def _flags_of_scripts(folder: Path, words: list[str]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and f'add_argument("{flag}"' not in re.sub(r"\(\s+", "(", sources):
            raise Fault(f"no flag of the scripts in {folder.name}: {flag}")


def _pytest(words: list[str]) -> None:
    was_flag = False
    for word in words:
        if word.startswith("-"):
            if word not in PYTEST_FLAGS:
                raise Fault(f"unknown flag of pytest: {word}")
        elif not was_flag and not (ROOT / word.partition("::")[0]).exists():
            raise Fault(f"no such file: {word}")
        was_flag = word in ("-k", "-m", "-n")


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace | None:
    """The options, or None for `--help`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(words)
    except SystemExit as error:
        if error.code:
            raise Fault(said.getvalue().strip().splitlines()[-1]) from None
        return None


# Other programs


def _pip(words: list[str]) -> None:
    if words[:1] not in (["install"], ["wheel"]):
        raise Fault(f"unknown: pip {' '.join(words[:1])}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words[1:]:
        for names in re.findall(r"^(?:grpo-ext|\.|\./grpo-ext)\[(.*)\]$", word):
            for name in names.split(","):
                if name not in extras:
                    raise Fault(f"no extra of grpo-ext: {name}")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "grpo-ext": _grpo_ext,
    "accelerate": _accelerate,
    "python": _python,
    "python3": _python,
    "bash": _python,
    "pytest": _pytest,
    "pip": _pip,
    "cd": lambda words: None,
    "source": lambda words: None,
    "export": lambda words: None,
}
