"""`grpo-ext merge outputs/math merged`: one model of base and adapter, compared with the two."""

import argparse

from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show

DTYPES = ("bfloat16", "float32")  # those of `model.merge`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the output folder of a run, or an adapter on the Hub")
    parser.add_argument("out", metavar="OUT", help="a new folder for the merged model")
    parser.add_argument("--base", metavar="NAME", help="the base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Merge, save, load again, and print how far the logits are from those of base and adapter."""
    quiet_libraries()
    from grpo_ext.model.merge import merge_adapter

    found = merge_adapter(options.adapter, options.out, base=options.base, dtype=options.dtype)
    show(f"merged with base and adapter, in {options.dtype}: {found}")
    show(f"the model, its tokenizer and its generation config are in {options.out}")
