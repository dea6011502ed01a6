"""Arguments of the commands that read problems."""

import argparse


def add_data_arguments(parser: argparse.ArgumentParser, *, split: str) -> None:
    """Add the arguments that name the data, its split and columns, and what happens to rows that cannot be judged.

    Args:
        split: the one that is taken by default, unless the data has only one.
    """
    parser.add_argument(
        "--data", required=True, help="a file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or a Hub name"
    )
    parser.add_argument("--split", default=split, help="of the data; default: %(default)s, or the only one")
    parser.add_argument("--prompt_column", help="of the question, with dots for the keys of a dict")
    parser.add_argument(
        "--answer_column", "--gold", help="of the gold answer, with dots for the keys of a dict (answers of the audit)"
    )
    parser.add_argument(
        "--unreadable_gold",
        choices=["error", "drop"],
        default="error",
        help="rows without a question or a readable gold answer; default: %(default)s",
    )
