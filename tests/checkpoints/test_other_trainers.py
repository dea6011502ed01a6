"""Checkpoints of stock TRL are resumed as TRL resumes them, and are never deleted or overwritten."""

import pytest
from trl import GRPOTrainer

from grpo_ext import TRL_DEFAULTS, GRPOExtTrainer
from tests.tools.models import random_lora, small_llama
from tests.tools.training import adapter_of

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture
def train(build, tokenizer):
    def run(kind, resume=None, **settings):
        trainer = build(
            small_llama(tokenizer), trainer=kind, peft_config=random_lora(), **TRL_DEFAULTS | SETTINGS | settings
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("checkpoint-*/*") if path.is_file()}


def test_a_run_of_trl_continues_from_its_last_step(train, tmp_path, caplog):
    """Guards against a run that begins at step 0, overwrites TRL's checkpoints, and deletes the others by rotation."""
    train(GRPOTrainer)
    before = contents(tmp_path / "run")
    trainer = train(GRPOExtTrainer, resume=True, max_steps=5, save_total_limit=1)
    assert trainer.state.global_step == 5
    assert [row["step"] for row in trainer.state.log_history] == [1, 2, 3, 4, 5, 5]
    assert before.items() <= contents(tmp_path / "run").items()
    assert "resumed as in TRL" in caplog.text
    again = train(GRPOExtTrainer, resume=True, max_steps=5)  # the last one is ours
    for name, value in adapter_of(trainer).items():
        assert (adapter_of(again)[name] == value).all(), name


def test_a_run_that_would_overwrite_them_is_refused(train, tmp_path):
    train(GRPOTrainer)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"\(checkpoint-1, checkpoint-2, checkpoint-3\).*resume_from_checkpoint=True"):
        train(GRPOExtTrainer)
    with pytest.raises(ValueError, match=r"checkpoints of another trainer \(checkpoint-3\)"):
        train(GRPOExtTrainer, resume=str(tmp_path / "run" / "checkpoint-2"))
    train(GRPOExtTrainer, save_strategy="no")
    assert contents(tmp_path / "run") == before


def test_an_unfinished_checkpoint_of_ours_is_not_taken_for_one_of_trl(train, tmp_path, caplog):
    """A kill leaves a folder that differs from TRL's only by the file that is written first."""
    train(GRPOExtTrainer)
    (tmp_path / "run" / "checkpoint-3" / "complete.json").unlink()
    trainer = train(GRPOExtTrainer, resume=True)
    assert trainer.state.global_step == 3
    assert "checkpoint-3 is skipped: it is unfinished" in caplog.text
