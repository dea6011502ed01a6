"""`grpo-ext COMMAND`: what can be done before and after a run, with one command per file.

A command has `add_arguments(parser)` and `run(options)`. Only `run` and what it calls import libraries that take
seconds to load, so `grpo-ext COMMAND --help` is quick. An error of `run` is printed as one line. `run` may return a
function for the work whose errors need their traceback, such as a training.
"""

import argparse
from importlib import import_module

COMMANDS = {
    "train": "run a recipe, or the one that fits a data set",
    "plan": "does a model fit on a card, and with what settings?",
    "doctor": "what is missing on this machine, and what to type",
    "audit": "is a reward right on this data, and hard to cheat?",
    "eval": "how many problems a model solves, with or without an adapter",
    "merge": "make one model of a base and its adapter",
    "push": "publish what a run left behind on the Hub",
    "report": "what a run learned, as one page; several runs overlaid",
}


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: 1 if the command failed, or found something that must be fixed; 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="grpo-ext", description="What there is to do around a GRPO run.")
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        names.add_parser(name, help=summary, add_help=False)
    chosen, rest = parser.parse_known_args(argv)

    command = import_module(f"grpo_ext.cli.{chosen.command}")
    parser = argparse.ArgumentParser(prog=f"grpo-ext {chosen.command}", description=COMMANDS[chosen.command])
    command.add_arguments(parser)
    options = parser.parse_args(rest)
    from grpo_ext.console.terminal import escaping_unencodable

    try:
        with escaping_unencodable():
            after = command.run(options)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise SystemExit(f"grpo-ext: {error}") from None
    if after is not None:
        after()
