"""Completions in evaluation: those of transformers' own `generate`, with one prefill per prompt."""

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from grpo_ext.evaluation.complete import complete, evaluate
from grpo_ext.evaluation.dialogue import evaluate_dialogue
from grpo_ext.rollout.dialogue import Dialogue
from grpo_ext.rollout.example_envs import GuessNumber
from tests.tools.models import random_lora

PROMPTS = [f"Question: {a}+{7 * a}=?\nAnswer:" for a in (5, 31, 538, 4, 77)]  # of three lengths
SAMPLES = [prompt for prompt in PROMPTS for _ in range(4)]


def by_transformers(model, tokenizer, prompts, *, batch_size, do_sample, **settings):
    """The completions of `generate` in the order of `prompts`: batches of similar lengths, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    torch.manual_seed(0)
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in rows], padding=True, padding_side="left", return_tensors="pt")
        settings |= {"temperature": 0.8, "top_k": 0} if do_sample else {}
        output = model.generate(**inputs, do_sample=do_sample, max_new_tokens=40, tokenizer=tokenizer, **settings)
        for i, row in zip(rows, output[:, inputs["input_ids"].size(1) :], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ending", ["end of sequence", "several ids", "stop strings"])
def test_completions_are_those_of_transformers(tiny_model, tokenizer, temperature, ending):
    """With an adapter, in batches that split the samples of a problem, and whatever ends a completion. Otherwise an
    evaluation would measure another model than the one that a user runs."""
    model = get_peft_model(tiny_model, random_lora(lora_alpha=1)).eval()
    ends = {"eos_token_id": [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["3", "#"])]}
    settings = {"several ids": ends, "stop strings": {"stop_strings": ["=", "1 "]}}.get(ending, {})
    prompts = SAMPLES if temperature else PROMPTS
    expected = by_transformers(model, tokenizer, prompts, batch_size=6, do_sample=temperature > 0, **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert complete(model, tokenizer, prompts, max_new_tokens=40, temperature=temperature, batch_size=6) == expected
    assert "generate" not in vars(tiny_model)
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())
    with model.disable_adapter():
        assert complete(model, tokenizer, prompts, max_new_tokens=40, temperature=temperature) != expected


def test_samples_of_a_problem_share_the_prefill_of_its_prompt(tiny_model, tokenizer):
    """Completions of one token need no forward but the prefill, so eight samples cost the tokens of one."""
    tokens = []
    tiny_model.get_input_embeddings().register_forward_hook(lambda m, inputs, output: tokens.append(inputs[0].numel()))
    problems = [{"prompt": prompt} for prompt in PROMPTS]

    def tokens_for(samples):
        tokens.clear()
        reward = lambda completions, **columns: [1.0] * len(completions)  # noqa: E731
        evaluate(tiny_model, tokenizer, problems, reward, max_new_tokens=1, temperature=0.8, samples=samples)
        return sum(tokens)

    assert tokens_for(8) == tokens_for(1)


def test_what_needs_the_loop_of_transformers(tiny_model, tokenizer, caplog, monkeypatch):
    """A cache that cannot be forked: completions are still those of transformers, and the reason is logged once, for
    greedy and sampled completions alike. Dialogues cannot do without, and say so."""

    class OtherCache(DynamicCache):
        pass

    expected = complete(tiny_model, tokenizer, SAMPLES, max_new_tokens=40, temperature=0.8)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", OtherCache)
    with caplog.at_level(logging.WARNING):
        assert complete(tiny_model, tokenizer, SAMPLES, max_new_tokens=40, temperature=0.8) == expected
        complete(tiny_model, tokenizer, PROMPTS, max_new_tokens=4)
    assert caplog.text.count("transformers' own loop is used: its cache is a OtherCache") == 1
    rows, settings = [{"prompt": GuessNumber.rules, "answer": "7"}], {"max_new_tokens": 8, "temperature": 0.8}
    with pytest.raises(ValueError, match=r"the turn before.*its cache is a OtherCache"):
        evaluate_dialogue(tiny_model, tokenizer, rows, Dialogue(GuessNumber), **settings)
