"""`make docs`: every public name has its place in the pages, and a broken cross-reference is found."""

import importlib.util
import os

import pytest

import grpo_ext
from grpo_ext import rewards
from tests.docs import api_pages
from tests.docs.api_pages import broken_references, docstrings


@pytest.mark.parametrize(
    ("module", "reference"),
    [
        ("grpo_ext.config", "grpo_ext.losses.nowhere"),
        ("grpo_ext.config", "grpo_ext.losses.kl.nothing"),
        ("grpo_ext.config", "rewards.code.sandbox"),  # the import name is grpo_ext.rewards
        ("grpo_ext.config", "GRPOExtTrainr"),
        ("grpo_ext.config", "GRPOExtConfig.betta"),
        ("grpo_ext.config", "losses/nowhere.py"),
        ("grpo_ext.rewards.workers.pool", "nowhere.py"),
    ],
)
def test_a_broken_reference_is_found(module, reference):
    """As after a rename that forgot a docstring."""
    assert broken_references(module, f"See `{reference}`, and `beta`.") == [reference]


@pytest.mark.parametrize(
    ("module", "reference"),
    [
        ("grpo_ext.config", "grpo_ext.losses.kl"),
        ("grpo_ext.config", "grpo_ext.rewards.code.sandbox.Limits.seconds"),
        ("grpo_ext.trainer", "GRPOTrainer"),
        ("grpo_ext.losses.kl", "ScoringBatch"),  # of another module
        ("grpo_ext.config", "GRPOExtConfig.max_completion_length"),
        ("grpo_ext.config", "losses/kl.py"),
        ("grpo_ext.rewards.workers.worker", "pool.py"),
        ("grpo_ext.config", 'loss_type="grpo"'),
    ],
)
def test_what_leads_somewhere_is_not_broken(module, reference):
    assert broken_references(module, f"See `{reference}`.") == []


@pytest.mark.slow  # imports the whole package
def test_no_docstring_has_a_broken_reference():
    assert [(module, broken) for module, text in docstrings() if (broken := broken_references(module, text))] == []


@pytest.mark.slow  # imports the whole package
@pytest.mark.skipif(
    importlib.util.find_spec("pdoc") is None and os.environ.get("CI") != "true", reason="pdoc is missing: make docs"
)
def test_pages_have_the_public_names(tmp_path):
    api_pages.main(str(tmp_path))
    assert (tmp_path / "index.html").exists()
    for page, module in (("grpo_ext.html", grpo_ext), ("grpo_ext/rewards.html", rewards)):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert [name for name in module.__all__ if f'id="{name}"' not in text] == []
    options = (tmp_path / "grpo_ext.html").read_text(encoding="utf-8")
    assert [name for name in ("beta", "kl_stop") if f"<strong>{name}:</strong>" not in options] == []
