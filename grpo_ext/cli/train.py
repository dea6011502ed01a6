"""`grpo-ext train`: a recipe by its name, or the one that fits a data set.

    grpo-ext train math                                    the embedded model on three-digit sums, offline
    grpo-ext train coding --config mbpp_qlora.yaml         a preset of the recipes, or a file of yours
    grpo-ext train problems.jsonl --model MODEL            the recipe is chosen by the columns

All flags are those of the recipe (`grpo-ext train math --help`). One process trains. For several, start the recipe
itself: `accelerate launch -m grpo_ext.recipes.math`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

RECIPES = {
    "math": "answers that are compared with a gold answer",
    "coding": "programs that are run on tests, in a sandbox",
    "logic": "puzzles of reasoning-gym",
    "dialogue": "several turns with an environment",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipes = "\n".join(f"  {name:9} {subject}" for name, subject in RECIPES.items())
    parser.epilog = f"recipes:\n{recipes}\n\ntheir flags: grpo-ext train {next(iter(RECIPES))} --help"
    parser.add_argument(
        "what",
        metavar="RECIPE|DATA",
        help="a recipe, or data for the recipe that fits: a file (.jsonl, .csv, .parquet, ...), a folder, a Hub name",
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="flags of the recipe")


def run(options: argparse.Namespace) -> Callable[[], None]:
    """Choose the recipe; the function that is returned trains.

    Raises:
        ValueError: `what` is neither a recipe nor data, or there is no model for the data.
    """
    recipe, flags = options.what, options.flags
    if recipe not in RECIPES:
        recipe = _recipe_for(options.what, flags)
        flags = ["--dataset_name", options.what, *flags]
    return partial(import_module(f"grpo_ext.recipes.{recipe}").main, flags)


def _recipe_for(data: str, flags: list[str]) -> str:
    """The recipe for a data set, after a line that gives the reason."""
    if "/" not in data and not Path(data).exists():
        raise ValueError(f"'{data}' is neither a recipe ({', '.join(RECIPES)}) nor a file, a folder or OWNER/NAME.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "--model_name_or_path", "--model-name-or-path")
    parser.add_argument("--config")  # may name a model
    parser.add_argument("--dataset_config", "--dataset-config")
    given, _ = parser.parse_known_args(flags)
    if given.model is None and given.config is None:
        raise ValueError(f"which model? For example: grpo-ext train {data} --model Qwen/Qwen2.5-0.5B-Instruct")
    from grpo_ext.console.terminal import show
    from grpo_ext.data import load_splits, program_tests

    rows = next(iter(load_splits(data, given.dataset_config).rows.values()))
    tests = program_tests(rows.column_names)
    recipe, reason = (
        ("coding", f"tests of programs ({', '.join(tests)})") if tests else ("math", "no tests of programs")
    )
    show(f"recipe {recipe}: '{data}' has {reason}")
    return recipe
