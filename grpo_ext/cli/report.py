"""`grpo-ext report DIR`: a run, going, ended or dead, as one page; of several runs what differs."""

import argparse
from pathlib import Path

from grpo_ext.report.page import write_comparison, write_page
from grpo_ext.report.png_plots import draw_curves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output_dir of a run; several to compare them")
    parser.add_argument(
        "--output", default="comparison.html", help="file for the comparison of several runs; default: %(default)s"
    )


def run(options: argparse.Namespace) -> None:
    """Write `DIR/report.html` and `DIR/curves.png`, or the comparison of several runs, and say where."""
    if len(options.folders) > 1:
        print(f"the comparison is in {write_comparison(options.folders, Path(options.output))}")
        return
    (folder,) = options.folders
    print(f"the report is in {write_page(folder)}, its curves in {draw_curves(folder)}")
