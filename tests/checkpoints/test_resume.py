"""A run that was stopped and resumed is the run that was not, to the bit, whatever was in use when it was saved."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForCausalLM

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from grpo_ext.checkpoints import files as checkpoint
from grpo_ext.evaluation.callback import HeldOutAccuracy
from grpo_ext.evaluation.complete import evaluate
from grpo_ext.report.heldout_file import evaluation_metrics
from grpo_ext.report.run_reader import read_metrics
from rewards.workers.pool import isolated
from tests.conftest import (
    PROMPTS,
    SETTINGS,
    adapter_of,
    half_dead,
    in_two_processes,
    likes_step_two,
    random_lora,
    share_of_digits,
    small_llama,
)
from tests.distributed import two_resumed
from tests.distributed.two_resumed import watch
from tests.rewards.worker_rewards import logged

ACCELERATE = Path(sys.executable).with_name("accelerate")
# Of the log: what depends on the machine and on how busy it is.
TIMES = (
    "time/",
    "step_time",
    "peak_memory",
    "train_runtime",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "train_s",
)


def comparable(path):
    """The lines of a metrics file, sorted, without times; texts, so that null equals null."""
    rows = [
        {k: v for k, v in row.items() if not k.removeprefix("eval_").startswith(TIMES)} for row in read_metrics(path)
    ]
    return [json.dumps(row, sort_keys=True) for row in rows]


def rarely_good(completions, **columns):
    return [score if score > 0.5 else 0.0 for score in share_of_digits(completions)]


# Rollouts of several optimizer steps: of 4 micro-batches, in steps 0, 4 and 8, and of 3, where steps take 2.
LONG = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1, "max_steps": 9}
AWRY = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 2}
ONE_PASS = {"prompts": PROMPTS * 3}
MATRIX = {
    "a rollout a step, passes of two": {},
    "two steps on a rollout": {"num_iterations": 2},
    "four steps on a rollout": LONG,
    "rollouts of one and a half steps": AWRY | ONE_PASS,
    "passes that end in half a step": AWRY | {"prompts": PROMPTS[:3]},
    "three steps on such rollouts": AWRY | ONE_PASS | {"num_iterations": 2},
    "micro-batches of half groups": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "a log every third step": {"logging_steps": 3, "num_iterations": 2},
    "saved at the end of a pass": {"save_strategy": "epoch", "max_steps": 6},
    "saved where it is best, a log every third step": {"save_strategy": "best", "metric_for_best_model": "reward"}
    | {
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 3,
        "reward": likes_step_two,
    },
    "plain path": LONG | {"share_prompt": False},
    "loss of TRL": LONG | {"loss_type": "grpo", "beta": 0.1},
    "dapo": LONG | {"loss_type": "dapo", "beta": 0.0, "num_iterations": 2},
    "steered entropy bonus": {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef_delta": 0.01},
    "in chunks": LONG | {"chunk_tokens": 40},
    "exact KL": LONG | {"kl_estimator": "exact"},
    "KL in the log": LONG | {"beta": 0.0, "log_kl": True},
    "dead groups left out": LONG | {"dead_groups": "skip", "beta": 0.0, "entropy_coef": 0.0},
    "dead groups drawn anew": LONG | {"dead_groups": "resample", "num_iterations": 2},
    "growing groups": LONG | {"num_generations_max": 12, "reward": rarely_good},
    "replay": {"per_device_train_batch_size": 16, "replay_fraction": 0.5, "num_iterations": 2, "max_steps": 9},
    "temperature on a line": LONG | {"temperature_schedule": "linear", "temperature_end": 1.4},
    "temperature by entropy": LONG | {"temperature_schedule": "entropy", "temperature_entropy_target": 4.4},
    "temperature by entropy, dead groups left out": {"beta": 0.0, "entropy_coef": 0.0, "dead_groups": "skip"}
    | {"temperature_schedule": "entropy", "temperature_entropy_target": 4.4},
    "a reference that is mixed": LONG | {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "a reference that is copied": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0},
    "adapter on the head": LONG | {"peft_config": random_lora(target_modules=["q_proj", "lm_head"])},
    "an adapter that was trained before": LONG | {"trained_before": True},
    "whole model": LONG | {"whole": True},
    "whole model, moving reference": LONG | {"whole": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "answers masked where cut off": LONG | {"mask_truncated_completions": True},
    "stop strings": LONG | {"generation_kwargs": {"stop_strings": ["7"]}, "mask_truncated_completions": True},
    "evaluated on the way": LONG | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "rewards in a worker, completions logged": LONG
    | {"reward": isolated(logged, timeout_s=10, workers=1), "log_completions": True, "columns": {"answer": PROMPTS}},
    "cosine, warm-up, AdamW's decay": {"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1},
    "live dropout": {"disable_dropout": False, "peft_config": random_lora(lora_dropout=0.1)},
}
# Of the others, step 5 alone.
BETWEEN_PASSES = {
    "a rollout a step, passes of two": [3, 4],
    "four steps on a rollout": [3, 4, 5],
    "saved at the end of a pass": [2, 4],
    "saved where it is best, a log every third step": [2],
    "evaluated on the way": [4, 5],
}


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
        seen = watch(trainer)
        before(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    return run


def completions_in(folder):
    return {path.name: pandas.read_parquet(path).to_json() for path in (folder / "completions").glob("*.parquet")}


@pytest.mark.parametrize("name", MATRIX)
def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, name):
    """Adapter, tokens and advantages of every micro-step, and every line of the log. Step 5 lies in a later pass over
    the prompts, and inside a rollout where these serve several steps; after step 4, a pass is over."""
    settings = MATRIX[name] | ({"save_steps": 1} if name in BETWEEN_PASSES else {})
    whole, seen = train("whole", **settings)
    adapter, lines = adapter_of(whole), comparable(tmp_path / "whole" / "metrics.jsonl")
    assert len(lines) >= whole.state.global_step // whole.args.logging_steps
    for step in BETWEEN_PASSES.get(name, [5]):
        folder = tmp_path / f"again-{step}"
        again, seen_again = train(folder.name, resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
        first = step * whole.args.gradient_accumulation_steps if name != "passes that end in half a step" else 8
        assert seen_again == {micro_step: of_step for micro_step, of_step in seen.items() if micro_step >= first}
        for parameter, value in adapter_of(again).items():
            assert torch.equal(value, adapter[parameter]), (step, parameter)
        assert comparable(folder / "metrics.jsonl") == lines
        for file, completions in completions_in(folder).items():
            assert completions == completions_in(tmp_path / "whole")[file]


def test_the_log_is_that_of_the_checkpoint(train, tmp_path):
    """In the output folder of the run itself, killed between a log and its save, and in the middle of a line."""
    train("run", num_iterations=2)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = comparable(path)
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    path.write_text(path.read_text() + '{"step": 6, "loss": 9.0}\n{"step": 6, "lo')
    train("run", resume="last", num_iterations=2)
    assert comparable(path) == lines


def test_a_finished_run_is_left_as_it_is(train, tmp_path):
    """Killed after its last save, for example in the evaluation after training. Step 7 lies inside a pass, which
    transformers would go on with."""
    whole, _ = train("run")
    lines = comparable(tmp_path / "run" / "metrics.jsonl")
    again, seen = train("run", resume="last")
    assert seen == {}
    assert again.state.global_step == 7
    assert comparable(tmp_path / "run" / "metrics.jsonl") == lines
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(whole)[name]), name


def test_a_longer_run_goes_on(train, tmp_path):
    """With a constant rate, where its length does not count."""
    whole, _ = train("whole", max_steps=7, lr_scheduler_type="constant")
    train("run", max_steps=3, lr_scheduler_type="constant")
    again, _ = train("run", resume="last", max_steps=7, lr_scheduler_type="constant")
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(whole)[name]), name


def test_held_out_accuracy_on_the_way(train, tmp_path, tokenizer):
    """Measuring it moves nothing: the adapter is that of a run without it, and a resumed one has its lines."""
    problems = [{"prompt": prompt} for prompt in PROMPTS]

    def measured(trainer):
        settings = {"max_new_tokens": 8, "temperature": 0.8, "samples": 2}
        measure = partial(evaluate, trainer.model, tokenizer, problems, share_of_digits, **settings)
        trainer.add_callback(
            HeldOutAccuracy(measure(), measure, lambda found: trainer.log_alone(evaluation_metrics(found)))
        )

    plain, _ = train("plain", eval_steps=2, **LONG)
    whole, _ = train("whole", before=measured, eval_steps=2, **LONG)
    again, _ = train("again", before=measured, eval_steps=2, resume=str(tmp_path / "whole" / "checkpoint-5"), **LONG)
    for name, value in adapter_of(plain).items():
        assert torch.equal(value, adapter_of(whole)[name]), name
        assert torch.equal(value, adapter_of(again)[name]), name
    lines = comparable(tmp_path / "whole" / "metrics.jsonl")
    assert sum("heldout/pass@2" in line for line in lines) == 5
    assert comparable(tmp_path / "again" / "metrics.jsonl") == lines


def test_streamed_data(tmp_path, tokenizer):
    """Exact in the first pass; from then on nobody knows the place in the stream, and it is refused."""

    def streamed(folder):
        data = Dataset.from_dict({"prompt": PROMPTS * 3}).to_iterable_dataset()
        settings = SETTINGS | {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 1}
        settings |= LONG | {"max_steps": 14, "num_generations": 4, "max_completion_length": 8, "guards": False}
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Whole and resumed runs of every case of `two_resumed.py` in both processes, from one launch."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(two_resumed.__file__, folder, seconds=300)
    return folder


@pytest.mark.parametrize("case", two_resumed.CASES)
def test_two_processes_resume_as_they_were(two, case):
    """Each has its own rows of a rollout, its own random state and entropies; they share the order of prompts."""
    assert checkpoint.fault(two / case / "checkpoint-5") is None
    for process in (0, 1):
        whole, again = (torch.load(two / f"{case}-{kind}-{process}.pt") for kind in ("whole", "again"))
        assert again["seen"] == {step: rows for step, rows in whole["seen"].items() if step >= 5}
        for name, value in whole["adapter"].items():
            assert torch.equal(again["adapter"][name], value), name
    assert comparable(two / f"{case}-again" / "metrics.jsonl") == comparable(two / case / "metrics.jsonl")


def test_one_process_does_not_resume_two(two, train):
    with pytest.raises(ValueError, match="made with number of processes=2; this run has number of processes=1"):
        train("alone", resume=str(two / "rollouts" / "checkpoint-5"))
