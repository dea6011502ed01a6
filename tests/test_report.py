"""Evaluation, metrics file, picture and summary."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import TINY_DATA, random_lora

from grpo_ext.report.curves import draw_curves
from grpo_ext.report.evaluation import Estimate, complete, evaluate, judge, pass_at_k
from grpo_ext.report.metrics import append_metrics, read_metrics
from grpo_ext.report.summary import verdict
from grpo_ext.run.timing import PhaseTimer
from rewards import math_answer_reward

PROMPT = "Question: 538+478=?\nAnswer:"


def problems(count):
    rows = [json.loads(line) for line in (TINY_DATA / "test.jsonl").read_text().splitlines()[:count]]
    return [{"prompt": f"Question: {row['question']}\nAnswer:", "answer": row["answer"]} for row in rows]


def test_wilson_interval_by_hand():
    """39 of 100, z = 1.96: centre (0.39 + z^2/200) / (1 + z^2/100) = 0.3941, half width 0.0940."""
    estimate = Estimate.of([1.0] * 39 + [0.0] * 61)
    assert (estimate.value, estimate.n) == (0.39, 100)
    assert (estimate.low, estimate.high) == pytest.approx((0.3001, 0.4880), abs=2e-4)
    assert str(estimate) == "0.39 [0.30, 0.49]"
    assert Estimate.of([1.0] * 50).low > 0.9  # all right is not certainty


def test_pass_at_k_is_unbiased():
    """Against drawing k of the n samples in every possible way."""
    for n, correct, k in ((5, 2, 3), (4, 0, 2), (6, 6, 1), (6, 1, 6), (5, 4, 2)):
        draws = list(combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(correct, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_completions_equal_plain_generate(tiny_model, tokenizer):
    """Padding, batching and sorting must not change a greedy answer."""
    prompts = [p["prompt"] for p in problems(6)] + ["Question: 100+100=?\nAnswer: #### 2", "Q"]
    got = complete(tiny_model, tokenizer, prompts, max_new_tokens=40, batch_size=3)
    for prompt, text in zip(prompts, got, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = tiny_model.generate(**ids, max_new_tokens=40, do_sample=False)
        assert text == tokenizer.decode(out[0, ids["input_ids"].size(1) :], skip_special_tokens=True)


def test_evaluation_leaves_the_run_as_it_was(build, tiny_model, tokenizer):
    """Random state, training mode and checkpointing: an evaluation in the middle must not change the run."""
    model = build(tiny_model, peft_config=random_lora()).model
    model.train()
    model.gradient_checkpointing_enable()
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 20, "temperature": 0.8, "samples": 2}
    draws = [evaluate(model, tokenizer, problems(4), math_answer_reward, **settings) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.is_gradient_checkpointing
    assert draws[0] == draws[1]
    assert (draws[0].k, draws[0].greedy.n, len(draws[0].completions)) == (2, 4, 4)


def test_what_cannot_be_judged_is_wrong():
    rows = [{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": "?!"}]
    assert judge(math_answer_reward, rows, ["#### 1", "#### 1"]) == [True, False]


def test_metrics_survive_a_cut_line_and_numbers_that_json_lacks(build, small_model):
    trainer = build(small_model, peft_config=random_lora())
    path = trainer.args.output_dir + "/metrics.jsonl"
    trainer.train()
    append_metrics(trainer.args, 3, {"loss": float("nan"), "reward": 1.0})
    with Path(path).open("a") as file:
        file.write('{"step": 4, "los')  # killed here
    rows = read_metrics(Path(path))
    assert rows[-1] == {"step": 3, "loss": None, "reward": 1.0}
    assert draw_curves(trainer.args.output_dir).read_bytes().startswith(b"\x89PNG")


def test_resumed_runs_keep_their_metrics_and_fresh_ones_start_anew(build, small_model):
    trainer = build(small_model, peft_config=random_lora(), max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    model = trainer.model.unload()
    resumed = build(model, peft_config=random_lora(), max_steps=3, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=resumed.args.output_dir + "/checkpoint-2")
    path = Path(resumed.args.output_dir) / "metrics.jsonl"
    assert [row["step"] for row in read_metrics(path) if "loss" in row] == [1, 2, 3]
    fresh = build(resumed.model.unload(), peft_config=random_lora(), max_steps=1)
    fresh.train()
    assert [row["step"] for row in read_metrics(path) if "loss" in row] == [1]


def test_curves_refuse_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        draw_curves(tmp_path)


def test_verdict_reads_as_promised():
    before, after = ({"value": v, "low": v - 0.06, "high": v + 0.06, "n": 256} for v in (0.39, 0.93))
    summary = {"seconds": 100.2, "pass_at_1_before": before, "pass_at_1_after": after}
    summary |= {"sampled_pass_at_1_before": None, "sampled_pass_at_1_after": None}
    assert verdict(summary) == "held-out pass@1: 0.39 [0.33, 0.45] -> 0.93 [0.87, 0.99]  (greedy, n=256, 1 min 40 s)"


def test_nested_phases_are_counted_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("grpo_ext.run.timing.time.perf_counter", lambda: next(clock))
    phases = PhaseTimer()
    with phases("update"), phases("generate"):
        pass
    assert phases.pop() == {"update": 1.0 + 3.0, "generate": 2.0}
    assert phases.pop() == {}
