"""Folders of the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "recipes" / "tiny_math" / "model"
TINY_DATA = ROOT / "recipes" / "tiny_math" / "data"
