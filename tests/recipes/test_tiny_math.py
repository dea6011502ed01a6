"""The embedded model and its problems: disjoint, small, and a base that can reason but usually does not."""

import json
import random

import pytest
from transformers import AutoModelForCausalLM

from grpo_ext.evaluation.complete import complete, evaluate, grade
from grpo_ext.recipes.tiny_math import build
from grpo_ext.rewards import math_answer_reward
from tests.tools.paths import TINY_DATA, TINY_MODEL


def rows(split):
    return [json.loads(line) for line in (TINY_DATA / f"{split}.jsonl").read_text().splitlines()]


def operands(row):
    return tuple(sorted(map(int, row["question"].removesuffix("=?").split("+"))))


def test_problems_are_right_and_splits_disjoint():
    """By construction and by count: neither a+b nor b+a of a held-out problem was ever trained on."""
    for split, name, count in (("train", "train", 2048), ("test", "heldout", 512)):
        pairs = [operands(row) for row in rows(split)]
        assert len(set(pairs)) == len(pairs) == count
        assert {build.split_of(*pair) for pair in pairs} == {name}
        assert all(str(sum(pair)) == row["answer"] for pair, row in zip(pairs, rows(split), strict=True))
    assert build.split_of(123, 456) == build.split_of(456, 123)
    rng = random.Random(0)
    assert all(build.split_of(*build.draw(rng, "pretrain")) == "pretrain" for _ in range(100))


def test_both_ways_of_answering():
    assert build.worked_out(538, 478) == " 8+8+0=16 3+7+1=11 5+4+1=10 #### 1016"
    rng = random.Random(0)
    guesses = [build.blurted(rng, 538, 478) for _ in range(500)]
    right = guesses.count(" #### 1016") / len(guesses)
    assert set(guesses) == {" #### 1016", " #### 906"}  # 5+4, 3+7 and 8+8 without their carries
    assert 0.07 < right < 0.18


def test_the_model_is_small_and_its_tokenizer_reversible(tokenizer):
    assert (TINY_MODEL / "model.safetensors").stat().st_size <= 4_000_000
    text = "Question: 538+478=?\nAnswer: \\boxed{x_1} ~#"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_building_is_seeded(tmp_path, monkeypatch):
    """Two steps of the script, twice: the same bytes."""
    for name in ("a", "b"):
        model, _ = build.pretrain(steps=2, batch_size=4, learning_rate=1e-3, seed=0)
        model.save_pretrained(tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    build.write_problems(tmp_path / "test.jsonl", "heldout", 512, seed=0)
    assert (tmp_path / "test.jsonl").read_text() == (TINY_DATA / "test.jsonl").read_text()


@pytest.mark.slow
def test_the_base_model_can_but_usually_does_not(tokenizer):
    """Sampled at temperature 0.8: right in 25 to 55% of single answers, in at least 90% of groups of eight, and
    nearly always if it works the sum out."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    problems = [{"prompt": build.PROMPT.format(question=r["question"]), "answer": r["answer"]} for r in rows("test")]
    settings = {"max_new_tokens": 48, "temperature": 0.8, "batch_size": 512}
    found = evaluate(model, tokenizer, problems[:256], math_answer_reward, samples=8, **settings)
    assert 0.25 <= found.sampled.value <= 0.55
    assert found.pass_at_k.value >= 0.90
    completions = complete(model, tokenizer, [p["prompt"] for p in problems], **settings)
    worked_out = [(p, c) for p, c in zip(problems, completions, strict=True) if c.count("+") == 6]
    right = grade(math_answer_reward, [p for p, _ in worked_out], [c for _, c in worked_out])
    assert sum(right) / len(right) >= 0.97
