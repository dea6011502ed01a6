"""The documents: their paths, links and commands exist, and the code of the README runs."""

import re
import subprocess
import sys

import pytest

from grpo_ext import GRPOExtConfig, parts
from tests.tools.models import random_lora
from tests.tools.paths import ROOT
from tests.tools.training import log_of

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
    """As printed, in order, with the embedded model in place of one from the Hub."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = (
        "\n".join(blocks)
        .replace('"Qwen/Qwen2.5-0.5B"', repr(str(ROOT / "recipes/tiny_math/model")))
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


def test_the_stage_of_the_contributors_guide_works(build, small_model, monkeypatch):
    """As printed, together with one line in the list of stages and one field in the config."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    monkeypatch.setattr(parts, "STAGES", (*parts.STAGES, names["SampleAgain"]))
    monkeypatch.setattr(GRPOExtConfig, "sample_again", True, raising=False)
    sampled = []

    def dead_at_first(completions, **columns):
        sampled.append(len(completions))
        return [0.0 if len(sampled) == 1 else float(i % 2) for i in range(len(completions))]

    trainer = build(small_model, reward=dead_at_first, peft_config=random_lora(), max_steps=2)
    trainer.train()
    assert sampled == [8, 8, 8]  # twice in the first step, once in the second
    assert log_of(trainer, "frac_dead_groups") == [0.0, 0.0]
