"""A stopped and resumed run equals the uninterrupted one bit by bit, under every option with state."""

import shutil
from functools import partial

import pandas
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForCausalLM

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.evaluation.callback import HeldOutAccuracy
from grpo_ext.evaluation.complete import evaluate
from grpo_ext.report.heldout_file import evaluation_metrics
from grpo_ext.rewards.workers.pool import isolated
from tests.rewards.worker_rewards import logged
from tests.tools.lanes import THOROUGH, slow_but, thinned
from tests.tools.metrics import comparable
from tests.tools.models import random_lora, small_llama
from tests.tools.reward_functions import PROMPTS, half_dead, likes_step_two, share_of_digits
from tests.tools.training import SETTINGS, adapter_of, record_updates


def rarely_good(completions, **columns):
    return [score if score > 0.5 else 0.0 for score in share_of_digits(completions)]


# A rollout of 4 micro-batches serves 4 steps (new rollouts at steps 0, 4 and 8); one of 3 serves one and a half.
LONG = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1, "max_steps": 9}
MISALIGNED = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 2}
MATRIX = {
    "one rollout per step, epochs of two": {},
    "two steps on a rollout": {"num_iterations": 2},
    "four steps on a rollout": LONG,
    "epochs that end in half a step": MISALIGNED | {"prompts": PROMPTS[:3]},
    "rollouts of one and a half steps, used twice": MISALIGNED | {"prompts": PROMPTS * 3, "num_iterations": 2},
    "micro-batches of half groups": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "a log every third step": {"logging_steps": 3, "num_iterations": 2},
    "saved at the end of an epoch": {"save_strategy": "epoch", "max_steps": 6},
    "saved if best, a log every third step": {"save_strategy": "best", "metric_for_best_model": "reward"}
    | {
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 3,
        "reward": likes_step_two,
    },
    "plain path": LONG | {"share_prompt": False},
    "dapo": LONG | {"loss_type": "dapo", "beta": 0.0, "num_iterations": 2},
    "adaptive entropy bonus": {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef_delta": 0.01},
    "exact KL in chunks": LONG | {"kl_estimator": "exact", "chunk_tokens": 40},
    "KL in the log": LONG | {"beta": 0.0, "log_kl": True},
    "dead groups resampled": LONG | {"dead_groups": "resample", "num_iterations": 2},
    "growing groups": LONG | {"num_generations_max": 12, "reward": rarely_good},
    "replay": {"per_device_train_batch_size": 16, "replay_fraction": 0.5, "num_iterations": 2, "max_steps": 9},
    # the third rollout, after step 5, is the first one that chooses by pass rates alone
    "difficulty pools": LONG | {"curriculum": "pools", "prompts": PROMPTS + PROMPTS[:2], "dead_groups": "resample"},
    "linear temperature": LONG | {"temperature_schedule": "linear", "temperature_end": 1.4},
    "temperature from entropy": LONG | {"temperature_schedule": "entropy", "temperature_entropy_target": 4.4},
    "dead groups skipped": LONG | {"beta": 0.0, "entropy_coef": 0.0},
    "copied reference": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0},
    "adapter on the head": LONG | {"peft_config": random_lora(target_modules=["q_proj", "lm_head"])},
    "previously trained adapter": LONG | {"trained_before": True},
    "whole model, moving reference": LONG | {"whole": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "stop strings": LONG | {"generation_kwargs": {"stop_strings": ["7"]}, "mask_truncated_completions": True},
    "evaluated during training": LONG | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "rewards in a worker, completions logged": LONG
    | {"reward": isolated(logged, timeout_s=10, workers=1), "log_completions": True, "columns": {"answer": PROMPTS}},
    "cosine, warm-up, AdamW's decay": {"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1},
    "dropout": {"disable_dropout": False, "peft_config": random_lora(lora_dropout=0.1)},
}
# Steps to resume from; all but the first with THOROUGH=1. The other cases resume from step 5 only.
RESUMED_STEPS = {
    "one rollout per step, epochs of two": [4, 3],
    "four steps on a rollout": [4, 3, 5],
    "saved at the end of an epoch": [2, 4],
    "saved if best, a log every third step": [2],
    "evaluated during training": [4, 5],
}
if not THOROUGH:
    RESUMED_STEPS = {name: steps[:1] for name, steps in RESUMED_STEPS.items()}


@pytest.fixture
def train(build, tokenizer, tmp_path):
    small_llama(tokenizer).save_pretrained(tmp_path / "base")

    def run(folder, *, resume=None, before=lambda trainer: None, whole=False, trained_before=False, **settings):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        settings = {"reward": half_dead, "peft_config": None if whole else random_lora()} | settings
        if trained_before:
            torch.manual_seed(1)
            model = get_peft_model(model, settings.pop("peft_config"))
        if "eval_strategy" in settings:
            settings["arguments"] = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})}
        settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5} | settings
        trainer = build(model, output_dir=str(tmp_path / folder), **settings)
        seen = record_updates(trainer)
        before(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    return run


def completions_in(folder):
    return {path.name: pandas.read_parquet(path).to_json() for path in (folder / "completions").glob("*.parquet")}


# Others have the same kinds of state.
THOROUGH_ONLY = (
    "micro-batches of half groups",
    "a log every third step",
    "plain path",
    "dapo",
    "exact KL in chunks",
    "KL in the log",
    "linear temperature",
    "dead groups skipped",
    "copied reference",
    "adapter on the head",
    "stop strings",
    "cosine, warm-up, AdamW's decay",
)


@pytest.mark.parametrize("name", slow_but(thinned(MATRIX, THOROUGH_ONLY), ["two steps on a rollout", "replay"]))
def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path, name):
    """The adapter, the tokens and advantages of every micro-step, and the lines of the log are the same. Step 5 is in a
    later epoch, and inside a rollout if rollouts serve several steps. An epoch ends after step 4."""
    settings = MATRIX[name] | ({"save_steps": 1} if name in RESUMED_STEPS else {})
    whole, seen = train("whole", **settings)
    adapter, lines = adapter_of(whole), comparable(tmp_path / "whole" / "metrics.jsonl")
    assert len(lines) >= whole.state.global_step // whole.args.logging_steps
    for step in RESUMED_STEPS.get(name, [5]):
        folder = tmp_path / f"again-{step}"
        again, seen_again = train(folder.name, resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
        first = step * whole.args.gradient_accumulation_steps if name != "epochs that end in half a step" else 8
        assert seen_again == {micro_step: of_step for micro_step, of_step in seen.items() if micro_step >= first}
        for parameter, value in adapter_of(again).items():
            assert torch.equal(value, adapter[parameter]), (step, parameter)
        assert comparable(folder / "metrics.jsonl") == lines
        for file, completions in completions_in(folder).items():
            assert completions == completions_in(tmp_path / "whole")[file]


def test_log_lines_after_the_checkpoint_are_replaced(train, tmp_path):
    """The run is killed between a log and its save, in the middle of a line, and resumed in its own output folder."""
    train("run", num_iterations=2)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = comparable(path)
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    path.write_text(path.read_text() + '{"step": 6, "loss": 9.0}\n{"step": 6, "lo')
    train("run", resume="last", num_iterations=2)
    assert comparable(path) == lines


def test_a_finished_run_is_left_unchanged(train, tmp_path):
    """The run is killed after its last save, for example in the evaluation after training. Step 7 is inside an epoch,
    which transformers would continue."""
    whole, _ = train("run")
    lines = comparable(tmp_path / "run" / "metrics.jsonl")
    again, seen = train("run", resume="last")
    assert seen == {}
    assert again.state.global_step == 7
    assert comparable(tmp_path / "run" / "metrics.jsonl") == lines
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(whole)[name]), name


@pytest.mark.slow
def test_a_run_can_be_extended(train, tmp_path):
    """This needs a constant learning rate, which does not depend on the length of the run."""
    whole, _ = train("whole", max_steps=7, lr_scheduler_type="constant")
    train("run", max_steps=3, lr_scheduler_type="constant")
    again, _ = train("run", resume="last", max_steps=7, lr_scheduler_type="constant")
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(whole)[name]), name


@pytest.mark.slow
def test_held_out_accuracy_during_training(train, tmp_path, tokenizer):
    """Measuring it changes nothing: the adapter equals that of a run without it. A resumed run logs the same lines."""
    problems = [{"prompt": prompt} for prompt in PROMPTS]

    def add_measurement(trainer):
        settings = {"max_new_tokens": 8, "temperature": 0.8, "samples": 2}
        measure = partial(evaluate, trainer.model, tokenizer, problems, share_of_digits, **settings)
        trainer.add_callback(
            HeldOutAccuracy(measure(), measure, lambda found: trainer.log_alone(evaluation_metrics(found)))
        )

    plain, _ = train("plain", eval_steps=2, **LONG)
    whole, _ = train("whole", before=add_measurement, eval_steps=2, **LONG)
    again, _ = train(
        "again", before=add_measurement, eval_steps=2, resume=str(tmp_path / "whole" / "checkpoint-5"), **LONG
    )
    for name, value in adapter_of(plain).items():
        assert torch.equal(value, adapter_of(whole)[name]), name
        assert torch.equal(value, adapter_of(again)[name]), name
    lines = comparable(tmp_path / "whole" / "metrics.jsonl")
    assert sum("heldout/pass@2" in line for line in lines) == 5
    assert comparable(tmp_path / "again" / "metrics.jsonl") == lines


@pytest.mark.slow
def test_streamed_data(tmp_path, tokenizer):
    """Resuming is exact in the first epoch. Later, the position in the stream is unknown, and resuming is refused."""

    def streamed(folder):
        data = Dataset.from_dict({"prompt": PROMPTS * 3}).to_iterable_dataset()
        settings = SETTINGS | {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 1}
        settings |= LONG | {"max_steps": 14, "num_generations": 4, "max_completion_length": 8, "guards": False}
        settings |= {"reward_workers": 0}
        arguments = {"train_dataset": data, "processing_class": tokenizer, "peft_config": random_lora()}
        return GRPOExtTrainer(small_llama(tokenizer), half_dead, GRPOExtConfig(**settings), **arguments)

    whole = streamed("whole")
    whole.train()
    again = streamed("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(whole)[name]), name
    with pytest.raises(ValueError, match="was made in pass 2 over a streamed data set"):
        streamed("again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
