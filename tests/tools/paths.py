"""Folders and files of the checkout."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "recipes" / "tiny_math" / "model"
TINY_DATA = ROOT / "recipes" / "tiny_math" / "data"


def tracked_files(*options: str) -> list[str]:
    """The files that git tracks, relative to the root; `options` are those of `git ls-files`."""
    listed = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()
