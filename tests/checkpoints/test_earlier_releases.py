"""Checkpoints of earlier releases, saved in the middle of a rollout with replay and a moving temperature.

first_format/       of 0.1, in a format that is refused; also with a moving reference
release_0_2_0/      of 0.2, in the present format, but without its number
"""

import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.checkpoints.resume import FORMAT
from grpo_ext.report.run_reader import read_metrics
from grpo_ext.rewards import math_answer_reward
from tests.tools.paths import ROOT
from tests.tools.training import record_updates

FOLDER = ROOT / "tests" / "checkpoints"
CHECKPOINT, CHECKPOINT_0_2 = (FOLDER / name / "checkpoint-5" for name in ("first_format", "release_0_2_0"))
MODEL = "recipes/tiny_math/model"  # relative to the checkout, as in the checkpoint
QUESTIONS = ["12+30=?", "7+8=?", "120+345=?", "538+478=?", "101+202=?", "614+303=?", "900+50=?", "333+444=?"]


MOVING_REFERENCE = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}


def trainer_of_the_checkpoint(output_dir, lora, **settings):
    args = GRPOExtConfig(
        **settings,
        output_dir=output_dir,
        max_steps=7,
        save_strategy="steps",
        save_steps=1,
        num_generations=4,
        per_device_train_batch_size=16,
        num_iterations=2,
        max_completion_length=12,
        temperature=1.0,
        temperature_schedule="entropy",
        temperature_entropy_target=1.0,
        replay_fraction=0.5,
        replay_max_age=6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        reward_workers=0,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=3,
    )
    answers = [str(sum(map(int, question[:-2].split("+")))) for question in QUESTIONS]
    return GRPOExtTrainer(
        MODEL,
        reward_funcs=math_answer_reward,
        args=args,
        train_dataset=Dataset.from_dict(
            {"prompt": [f"Question: {question}\nAnswer:" for question in QUESTIONS], "answer": answers}
        ),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )


def test_it_is_refused_and_not_resumed_without_its_state(tmp_path, monkeypatch):
    """Its schedule, replay buffer and rollout would be lost silently."""
    monkeypatch.chdir(ROOT)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    trainer = trainer_of_the_checkpoint(str(tmp_path / "run"), lora, **MOVING_REFERENCE)
    with pytest.raises(ValueError, match="was made by an earlier version of grpo-ext"):
        trainer.train(resume_from_checkpoint=str(CHECKPOINT))


def test_a_checkpoint_of_the_previous_release_is_continued(tmp_path, monkeypatch):
    """Step 6 trains on the rest of the saved rollout, at the saved temperature and with the saved replay buffer."""
    monkeypatch.chdir(ROOT)
    lora = {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    trainer = trainer_of_the_checkpoint(str(tmp_path / "run"), lora)
    seen = record_updates(trainer)
    trainer.train(resume_from_checkpoint=str(CHECKPOINT_0_2))
    rollout = load_file(CHECKPOINT_0_2 / "state_0.safetensors")
    assert seen[5][0] == rollout["trainer/rollout/0/completion_ids"].tolist()
    assert trainer.state.global_step == 7
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 8))
    assert json.loads((tmp_path / "run" / "checkpoint-7" / "run.json").read_text())["format"] == FORMAT
