"""Arguments shared by the commands that read problems."""

import argparse


def add_data_arguments(parser: argparse.ArgumentParser, *, split: str, required: bool = True) -> None:
    """Add the arguments for the data, its split and columns, and for rows that cannot be judged.

    Args:
        split: the default split, used unless the data has only one.
        required: whether `--data` must be given.
    """
    parser.add_argument(
        "--data", required=required, help="a file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or a Hub name"
    )
    parser.add_argument(
        "--split", default=split, help="the split to use; default: %(default)s, or the only split of the data"
    )
    parser.add_argument(
        "--prompt_column",
        help="column of the question, with dots for the keys of a dict; default: recognised by its name",
    )
    parser.add_argument(
        "--answer_column",
        "--gold",
        help="column of the gold answer, with dots for the keys of a dict; default: recognised by its name",
    )
    parser.add_argument(
        "--unreadable_gold",
        choices=["error", "drop"],
        default="error",
        help="what to do with rows without a question or a readable gold answer; default: %(default)s",
    )
