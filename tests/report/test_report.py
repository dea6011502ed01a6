"""Evaluation, metrics file, picture and summary."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_ext.console.phase_timer import PhaseTimer
from grpo_ext.evaluation.complete import accuracy_by_kind, complete, evaluate, grade
from grpo_ext.evaluation.estimates import Difference, Estimate, pass_at_k
from grpo_ext.report.metrics_file import append_metrics
from grpo_ext.report.plot_data import MAX_POINTS, build_panels
from grpo_ext.report.png_plots import draw_curves
from grpo_ext.report.run_reader import RunRecord, read_metrics, verdict
from grpo_ext.report.summary import accuracy_lines
from grpo_ext.rewards import math_answer_reward
from tests.tools.models import random_lora
from tests.tools.paths import TINY_DATA

PROMPT = "Question: 538+478=?\nAnswer:"


def problems(count):
    rows = [json.loads(line) for line in (TINY_DATA / "test.jsonl").read_text().splitlines()[:count]]
    return [{"prompt": f"Question: {row['question']}\nAnswer:", "answer": row["answer"]} for row in rows]


def test_accuracy_by_difficulty():
    """Columns with a single value, or with another value for every problem, are skipped. Values are in natural
    order."""
    rows = [{"level": f"Level {i % 2 * 8 + 2}", "subject": "algebra", "type": i, "difficulty": None} for i in range(20)]
    kinds = accuracy_by_kind(rows, [i % 4 == 1 for i in range(20)])
    assert list(kinds) == ["level"]
    assert [(name, share.value, share.n) for name, share in kinds["level"].items()] == [
        ("Level 2", 0.0, 10),
        ("Level 10", 0.5, 10),
    ]


def test_completions_equal_plain_generate(tiny_model, tokenizer):
    """Padding, batching and sorting must not change a greedy completion."""
    prompts = [p["prompt"] for p in problems(6)] + ["Question: 100+100=?\nAnswer: #### 2", "Q"]
    got = complete(tiny_model, tokenizer, prompts, max_new_tokens=40, batch_size=3)
    for prompt, text in zip(prompts, got, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = tiny_model.generate(**ids, max_new_tokens=40, do_sample=False)
        assert text == tokenizer.decode(out[0, ids["input_ids"].size(1) :], skip_special_tokens=True)


def test_evaluation_leaves_the_run_as_it_was(build, tiny_model, tokenizer):
    """An evaluation in the middle must not change a run: its random state, training mode and checkpointing."""
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


def test_pass_at_k_for_every_k_up_to_the_samples(tiny_model, tokenizer):
    """All come from the same samples: pass@6 of 6 is whether any is right, and sampled pass@1 is the mean share."""
    settings = {"max_new_tokens": 20, "temperature": 0.8, "samples": 6}
    found = evaluate(tiny_model, tokenizer, problems(8), math_answer_reward, **settings)
    assert list(found.pass_at) == [2, 4, 6]
    assert found.pass_at[6] == found.pass_at_k == Estimate.of([float(share > 0) for share in found.shares])
    assert found.sampled == Estimate.of(found.shares)
    hits = [round(6 * share) for share in found.shares]
    assert found.pass_at[2].value == pytest.approx(sum(pass_at_k(hit, 6, 2) for hit in hits) / 8)
    assert 0 < found.sampled.value < found.pass_at[2].value < found.pass_at[6].value


def test_an_answer_that_cannot_be_judged_is_wrong():
    rows = [{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": "?!"}]
    assert grade(math_answer_reward, rows, ["#### 1", "#### 1"]) == [True, False]


def test_metrics_survive_a_truncated_line_and_numbers_that_json_lacks(build, small_model):
    trainer = build(small_model, peft_config=random_lora())
    path = trainer.args.output_dir + "/metrics.jsonl"
    trainer.train()
    append_metrics(trainer.args, 3, {"loss": float("nan"), "reward": 1.0})
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "los')  # killed here
    rows = read_metrics(Path(path))
    assert rows[-1] == {"step": 3, "loss": None, "reward": 1.0}
    assert draw_curves(trainer.args.output_dir).read_bytes().startswith(b"\x89PNG")


def test_resumed_runs_keep_their_metrics_and_new_ones_start_again(build, small_model):
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


def a_step(step, **changes):
    row = {"step": step, "loss": 0.1, "reward": 0.5, "kl": 0.01, "kl_sequence": 0.3, "entropy": 1.0, "grad_norm": 2.0}
    row |= {"completions/mean_length": 9.0, "completions/min_length": 1.0, "completions/max_length": 12.0}
    row |= {"completions/clipped_ratio": 0.5, "frac_groups/all_right": 0.25, "frac_groups/all_wrong": 0.25}
    row |= {"frac_groups/mixed": 0.5, "time/generate": 1.0, "time/update": 2.0, "advantages/mean": 0.0}
    row |= {"pools/unseen": 0.5, "pools/unsolved": 0.25, "pools/learning": 0.25, "pools/solved": 0.0}
    row |= {"rewards/right/mean": 0.5, "rewards/format_reward/mean": 0.9, "peak_memory_mb": 2 * 2**30 / 1e6}
    return row | changes


def test_panels_are_in_the_order_in_which_they_are_read():
    """A metric that was not logged takes no space, and rewards for shape are not added to rewards for being right."""
    heldout = {"heldout/pass@1": 0.1, "heldout/pass@1/low": 0.0, "heldout/pass@1/high": 0.2}
    rows = [{"step": 0, **heldout}, a_step(1), a_step(2, **{"nonfinite/skipped": 1.0})]
    panels = {panel.title: panel for panel in build_panels(rows)}
    assert list(panels) == [
        "Held-out problems solved",
        "Rewards for being right",
        "Rewards for the shape of the text",
        "Mean raw reward",
        "Groups by their rewards",
        "Training problems by pool",
        "Length of completions",
        "Reward against KL, step by step",
        "KL to the reference",
        "Token entropy",
        "Gradient norm",
        "Time per step",
        "Peak memory so far",
        "Mean normalised reward",
        "Total loss (not a measure of progress)",
    ]
    assert panels["Rewards for being right"].lines[0].y == [0.5, 0.5]
    assert panels["Rewards for the shape of the text"].lines[0].y == [0.9, 0.9]
    accuracy = panels["Held-out problems solved"].lines[0]
    assert (accuracy.x, accuracy.y, accuracy.low, accuracy.high) == ([0], [0.1], (0.0,), (0.2,))
    assert [(line.label, line.y) for line in panels["Groups by their rewards"].lines] == [
        ("all wrong", [0.25, 0.25]),
        ("mixed", [0.5, 0.5]),
        ("all right", [0.25, 0.25]),
    ]
    assert [(line.label, line.y) for line in panels["Training problems by pool"].lines] == [
        ("unsolved", [0.25, 0.25]),
        ("learning", [0.25, 0.25]),
        ("solved", [0.0, 0.0]),
        ("unseen", [0.5, 0.5]),
    ]
    length, cut = panels["Length of completions"].lines
    assert (length.low, length.high, cut.y, cut.on_right_axis) == ((1.0, 1.0), (12.0, 12.0), [0.5, 0.5], True)
    assert panels["KL to the reference"].unit == "nats per completion"
    assert [line.y for line in panels["Gradient norm"].lines if line.on_right_axis] == [[1.0]]
    assert panels["Peak memory so far"].lines[0].y == pytest.approx([2.0, 2.0])  # GB of 2^30 bytes, as in plans
    assert [panel.title for panel in build_panels([{"step": 1, "loss": None, "reward": 1.0}])] == ["Mean raw reward"]
    assert build_panels([{"step": 3, "train_runtime": 1.0}]) == []


def test_lines_are_smoothed_and_long_runs_thinned():
    """The running mean is over a tenth of the run around a step. For 2,500 steps, each point is the mean of three."""
    rows = [a_step(i, reward=float(i % 7)) for i in range(1, 41)]
    line = next(panel for panel in build_panels(rows) if panel.title == "Mean raw reward").lines[0]
    expected = [np.mean(line.y[max(0, i - 2) : i + 3]) for i in range(40)]
    assert line.mean == pytest.approx(expected)
    rows = [a_step(i, reward=float(i)) for i in range(1, 2501)]
    line = next(panel for panel in build_panels(rows) if panel.title == "Mean raw reward").lines[0]
    assert len(line.x) <= MAX_POINTS
    assert line.x[:2] == line.y[:2] == [2.0, 5.0]


def test_a_phase_that_a_step_lacks_took_no_time():
    """A step that reuses a rollout has no sampling, and must not vanish from the picture."""
    rows = [a_step(1), {name: value for name, value in a_step(2).items() if name != "time/generate"}]
    layers = next(panel for panel in build_panels(rows) if panel.title == "Time per step").lines
    assert [(line.label, line.y) for line in layers] == [("generate", [1.0, 0.0]), ("update", [2.0, 2.0])]


def test_curves_refuse_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        draw_curves(tmp_path)


def test_verdict_reads_as_promised():
    before, after = ({"value": v, "low": v - 0.06, "high": v + 0.06, "n": 256} for v in (0.39, 0.93))
    change = asdict(Difference.of([0.0] * 138 + [1.0] * 118, [1.0] * 238 + [0.0] * 18))
    summary = {"seconds": 100.2, "pass_at_1_before": before, "pass_at_1_after": after, "pass_at_1_difference": change}
    summary |= {f"sampled_pass_at_1_{part}": None for part in ("before", "after", "difference")}
    assert accuracy_lines(summary) == (
        "held-out pass@1: 0.39 [0.33, 0.45] -> 0.93 [0.87, 0.99], +0.47 [+0.39, +0.54], p < 0.001  "
        "(greedy, n=256, 1 min 40 s)"
    )


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (36, 255, "It learned: from 14% to 99.6% of 256 held-out problems (+86 points, 95% interval +80 to +89)."),
        (255, 36, "It got worse: from 99.6% to 14% of 256 held-out problems (-86 points, 95% interval -89 to -80)."),
        (36, 42, "It learned: from 14% to 16% of 256 held-out problems (+2 points, 95% interval +0 to +4)."),
        (36, 40, "No change beyond chance: from 14% to 16% of 256 held-out problems"),
        (
            36,
            None,
            "Before training: 14% of 256 held-out problems (95% interval 10% to 19%). No evaluation since then.",
        ),
    ],
)
def test_the_verdict_in_one_sentence(before, after, sentence):
    """It may claim no more than the paired test does: 4 more of 256 are not enough, since p is 0.125."""
    counts = [before] if after is None else [before, after]
    evaluations = [{"step": i, "right": [1] * count + [0] * (256 - count)} for i, count in enumerate(counts)]
    run = RunRecord(folder=Path("x"), rows=[{"step": 1}], evaluations=evaluations, settings={})
    assert sentence in verdict(run)


def test_nested_phases_are_counted_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("grpo_ext.console.phase_timer.time.perf_counter", lambda: next(clock))
    phases = PhaseTimer()
    with phases("update"), phases("generate"):
        pass
    assert phases.pop() == {"update": 1.0 + 3.0, "generate": 2.0}
    assert phases.pop() == {}
