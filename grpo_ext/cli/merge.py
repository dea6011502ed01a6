"""`grpo-ext merge outputs/math merged`: merge base and adapter into one model, and compare it with the two.

grpo-ext merge outputs/math merged --gguf model.gguf        # also as a file for llama.cpp
"""

import argparse

from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show

DTYPES = ("bfloat16", "float32")  # supported by `model.merge`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the output folder of a run, or an adapter on the Hub")
    parser.add_argument("out", metavar="OUT", help="a new folder for the merged model")
    parser.add_argument("--base", metavar="NAME", help="the base model; default: the one that the adapter names")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of the merged weights; default: %(default)s"
    )
    parser.add_argument(
        "--gguf", metavar="FILE", help="also write the merged model, unquantised, to FILE, whose name ends in .gguf"
    )


def run(options: argparse.Namespace) -> None:
    """Merge, save and reload the model, and print how far its logits are from those of base and adapter."""
    quiet_libraries()
    from grpo_ext.model.gguf_file import check_gguf_target, write_gguf
    from grpo_ext.model.merge import merge_adapter

    if options.gguf:
        check_gguf_target(options.gguf)
    found = merge_adapter(options.adapter, options.out, base=options.base, dtype=options.dtype)
    show(f"merged model compared with base and adapter, in {options.dtype}: {found}")
    show(f"the model, its tokenizer and its generation config are in {options.out}")
    if options.gguf:
        found = write_gguf(options.out, options.gguf, dtype=options.dtype)
        show(f"{options.gguf} read by transformers compared with the merged model: {found}")
