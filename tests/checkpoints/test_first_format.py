"""A checkpoint in the first format, saved in the middle of a rollout with replay, a moving temperature and a moving
reference. `final.txt` has the SHA-256 of the adapter that the version which saved it reached at step 7."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.rewards import math_answer_reward
from tests.tools.paths import ROOT

CHECKPOINT = ROOT / "tests" / "checkpoints" / "first_format" / "checkpoint-5"
MODEL = "recipes/tiny_math/model"  # relative to the checkout, as in the checkpoint
QUESTIONS = ["12+30=?", "7+8=?", "120+345=?", "538+478=?", "101+202=?", "614+303=?", "900+50=?", "333+444=?"]


def trainer_of_the_checkpoint(output_dir):
    args = GRPOExtConfig(
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
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.6,
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
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def test_it_is_refused_and_not_resumed_without_its_state(tmp_path, monkeypatch):
    """Its schedule, replay buffer and rollout would be lost silently."""
    monkeypatch.chdir(ROOT)
    trainer = trainer_of_the_checkpoint(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="was made by an earlier version of grpo-ext"):
        trainer.train(resume_from_checkpoint=str(CHECKPOINT))
