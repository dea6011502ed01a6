"""Adapters folded into their layers while completions are drawn: rounding changes, nothing else, and not for good."""

import copy

import pytest
import torch
from conftest import TINY_MODEL, adapter_of, random_lora
from peft import get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from test_engine_sampling import generate, prompts_of
from test_engine_scoring import make
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_ext.engine import folding
from grpo_ext.engine.folding import folded
from grpo_ext.engine.sampling import GroupSampler


def patched(model):
    return [
        module for module in model.modules() if "forward" in vars(module) and isinstance(module, nn.Linear | LoraLinear)
    ]


@pytest.fixture
def llama():
    return make("llama", "sdpa", torch.float32)


@pytest.mark.parametrize("few_rows", [0, 16])
@pytest.mark.parametrize("adapter_on", [True, False])
def test_same_numbers_within_rounding(llama, monkeypatch, few_rows, adapter_on):
    """A token of each of eight rows, and a prompt; with the adapter on and off; a layer with a bias too."""
    monkeypatch.setattr(folding, "FEW_ROWS", few_rows)
    layer = llama.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.bias = nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
    if not adapter_on:
        llama.base_model.disable_adapter_layers()
    for shape in ((8, 1), (2, 30)):
        ids = torch.randint(2, 61, shape)
        with torch.no_grad():
            want = llama(input_ids=ids).logits
            with folded(llama.get_base_model()):
                assert patched(llama)
                got = llama(input_ids=ids).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_the_model_is_left_bit_for_bit(llama):
    """Also when drawing fails: weights are never written to, so there is nothing to undo but the layers' forwards."""
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the middle"), folded(llama.get_base_model()):
        raise RuntimeError("in the middle")
    assert not patched(llama)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_it_follows_the_adapter(llama):
    """What was folded at one rollout is not used at the next: the adapter has moved."""
    ids, mask = prompts_of(40)
    drawn = []
    for scale in (1.0, 5.0):
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.data *= scale
        with folded(llama.get_base_model()):
            drawn.append(generate(llama, ids, mask, custom_generate=GroupSampler(temperature=0.8)))
        plain = generate(llama, ids, mask)
        assert torch.equal(drawn[-1], plain)
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "dora"])
def test_left_alone_where_rounding_would_show(kind):
    """A sum in bfloat16 would lose most of the adapter, 4 bits all of it, and DoRA is no sum."""
    settings = {}
    if kind == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        TINY_MODEL, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32, **settings
    )
    model = get_peft_model(base, random_lora(use_dora=kind == "dora"))
    with folded(model.get_base_model()):
        assert not any(isinstance(module, LoraLinear) for module in patched(model))


def test_training_draws_with_it_unless_memory_is_short(build, small_model, monkeypatch):
    """With `chunk_tokens`, a second copy of the adapted weights could be what does not fit."""
    called = []
    fold = folding._is_foldable
    monkeypatch.setattr(folding, "_is_foldable", lambda module: called.append(module) or fold(module))
    adapters = []
    for settings in ({}, {"chunk_tokens": 40}, {"share_prompt": False}):
        called.clear()
        trainer = build(copy.deepcopy(small_model), peft_config=random_lora(), max_steps=1, **settings)
        trainer.train()
        assert bool(called) == (settings == {})
        adapters.append(adapter_of(trainer))
    for other in adapters[1:]:
        for name, value in adapters[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)
