"""`grpo-ext report DIR`: one page for a run that is still going, has ended or died, or a comparison of several runs."""

import argparse
from pathlib import Path

from grpo_ext.console.terminal import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output_dir of a run; give several to compare them")
    parser.add_argument(
        "--output", default="comparison.html", help="file for the comparison of several runs; default: %(default)s"
    )


def run(options: argparse.Namespace) -> None:
    """Write `DIR/report.html` and `DIR/curves.png`, or the comparison of several runs, and print their paths."""
    from grpo_ext.report.page import write_comparison, write_page

    if len(options.folders) > 1:
        show(f"the comparison is in {write_comparison(options.folders, Path(options.output))}")
        return
    from grpo_ext.report.png_plots import draw_curves

    (folder,) = options.folders
    show(f"the report is in {write_page(folder)}, the curves are in {draw_curves(folder)}")
