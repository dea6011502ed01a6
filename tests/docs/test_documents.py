"""The documents: the paths, links and commands in them exist, and the code of the README runs."""

import re
import subprocess
import sys

import pytest

from tests.tools.paths import ROOT

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "recipes/FAQ.md",
    "recipes/tiny_math/README.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_commands_of_the_documents_exist(document):
    text = (ROOT / document).read_text()
    files = set(re.findall(r"(?<![\w/.])((?:grpo_ext|rewards|recipes|tests|accelerate_configs)/[\w./-]*\w)", text))
    links = set(re.findall(r"\]\((?!https?://|#)([^)#]+)", text))
    missing = [path for path in files if not (ROOT / path).exists()]
    missing += [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert not missing
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_python_of_the_readme_runs(tmp_path):
    """The drop-in example, as printed, with the embedded model in place of the reader's own."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = (
        block.replace('"Qwen/Qwen2.5-0.5B"', repr(str(ROOT / "recipes/tiny_math/model")))
        .replace('load_dataset("openai/gsm8k", "main", split="train")', "embedded()")
        .replace('"gsm8k-lora"', f"{str(tmp_path)!r}, max_steps=1, max_completion_length=8")
    )
    assert code.count("recipes/tiny_math/model") == 1
    preamble = f"""
from datasets import load_dataset
def embedded():
    return load_dataset({str(ROOT / "recipes/tiny_math/data")!r}, split="train")
"""
    done = subprocess.run(
        [sys.executable, "-c", preamble + code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.jsonl").exists()
