"""One frozen backbone for policy and reference; adapters in float32, over a base in any precision."""

import gc

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import get_peft_config

from grpo_ext import GRPOExtConfig
from grpo_ext.model.adapters import count_parameters
from grpo_ext.model.load import PolicyConfig, frozen_dtype, model_init_kwargs, quantization
from tests.tools.models import NF4, random_lora, small_shape
from tests.tools.paths import TINY_MODEL
from tests.tools.training import adapter_of


def bytes_of_storages(tensors):
    """Bytes of the distinct storages behind these tensors: tied and shared ones count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def frozen_bytes(model):
    return {
        name: p.detach().contiguous().view(torch.uint8).clone()
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def test_the_reference_allocates_no_second_backbone(build, tokenizer):
    """With beta > 0, every parameter in the process that has the shape of the embedding belongs to the model."""
    lm = LlamaForCausalLM(LlamaConfig(**small_shape(tokenizer) | {"hidden_size": 48}))  # a size that no other test uses
    own = lm.model.embed_tokens.weight
    backbone = bytes_of_storages(lm.parameters())
    trainer = build(lm, peft_config=random_lora(), beta=0.1, max_steps=1)
    trainer.train()
    adapter = bytes_of_storages(adapter_of(trainer).values())
    assert trainer.ref_model is None
    assert bytes_of_storages(trainer.model.parameters()) == backbone + adapter
    gc.collect()
    alike = [t for t in gc.get_objects() if type(t) is torch.nn.Parameter and t.shape == own.shape]
    assert {t.untyped_storage().data_ptr() for t in alike} <= {
        p.untyped_storage().data_ptr() for p in trainer.model.parameters()
    }


def test_training_changes_only_the_adapter(build, small_model):
    trainer = build(small_model, peft_config=random_lora(), beta=0.1)
    frozen, adapter = frozen_bytes(trainer.model), adapter_of(trainer)
    assert all("lora_" in name for name in adapter)
    trainer.train()
    after = frozen_bytes(trainer.model)
    assert frozen.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(not torch.equal(value, adapter_of(trainer)[name]) for name, value in adapter.items())


@pytest.mark.parametrize("model_init_kwargs", [None, {"attn_implementation": "eager"}])
def test_a_base_loaded_by_name_gets_the_precision_of_the_device(build, model_init_kwargs):
    """TRL loads a base by name in float32 (TRL #7220). Here, bf16=True simulates a GPU that supports it."""
    trainer = build(
        str(TINY_MODEL),
        peft_config=random_lora(),
        bf16=True,
        max_steps=1,
        max_completion_length=4,
        model_init_kwargs=model_init_kwargs,
    )
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in adapter_of(trainer).values()} == {torch.float32}
    before = adapter_of(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())


def test_an_explicit_dtype_wins(build):
    trainer = build(str(TINY_MODEL), peft_config=random_lora(), bf16=True, model_init_kwargs={"dtype": "float32"})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_nf4_updates_every_adapter_weight(build):
    """20 steps at the default learning rate of 1e-5 change every lora_A and lora_B. TRL keeps the adapters of a
    quantised model in bfloat16, in which most such updates are lost to rounding."""
    trainer = build(
        str(TINY_MODEL), peft_config=random_lora(r=8), quantization_config=NF4, max_steps=20, learning_rate=1e-5
    )
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    frozen, adapter = frozen_bytes(trainer.model), adapter_of(trainer)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    trainer.train()
    after = adapter_of(trainer)
    assert len(after) == 2 * 7 * 4  # A and B of seven linear layers in four blocks
    for name, value in adapter.items():
        assert not torch.equal(value, after[name]), f"{name} did not move"
        # Adam changes a weight by about the learning rate per step: 20 x 1e-5, decaying to zero
        assert 1e-6 < (after[name] - value).abs().max() < 3e-4, name
    assert all(torch.equal(value, frozen_bytes(trainer.model)[name]) for name, value in frozen.items())


def test_evaluation_does_not_change_the_base(build):
    """On CPUs with AVX512-BF16, bitsandbytes repacks and rounds a 4-bit layer when it runs in evaluation mode."""
    trainer = build(str(TINY_MODEL), peft_config=random_lora(), quantization_config=NF4, max_steps=1)
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    frozen = frozen_bytes(trainer.model)
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert all(torch.equal(value, frozen_bytes(trainer.model)[name]) for name, value in frozen.items())
    assert layer.weight.quant_state.dtype == torch.float32


@pytest.mark.parametrize("quantised", [True, False])
def test_a_loaded_adapter_keeps_its_values_to_the_bit(build, tiny_model, tmp_path, quantised):
    """TRL 1.16 rounds the adapter of a quantised model to bfloat16 while it builds the trainer."""
    get_peft_model(tiny_model, random_lora()).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        TINY_MODEL, **({"quantization_config": NF4} if quantised else {"dtype": torch.bfloat16})
    )
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    loaded = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in loaded.values()} == {torch.float32}
    trainer = build(model, beta=0.1)
    for name, value in adapter_of(trainer).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, loaded[name]), name
    trainer.train()
    assert any(not torch.equal(value, loaded[name]) for name, value in adapter_of(trainer).items())


def test_recipe_defaults_of_lora_and_quantisation(tmp_path):
    model_args = PolicyConfig(model_name_or_path=str(TINY_MODEL), load_in_4bit=True)
    lora = get_peft_config(model_args)
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        args = GRPOExtConfig(output_dir=str(tmp_path), use_cpu=True, bf16=bf16)
        assert frozen_dtype(args) == dtype
        assert model_init_kwargs(model_args, args)["dtype"] == str(dtype).removeprefix("torch.")
        full = PolicyConfig(model_name_or_path=str(TINY_MODEL), use_peft=False)
        assert model_init_kwargs(full, args)["dtype"] == "float32"  # trainable weights are not kept in bf16
        config = quantization(model_args, args)
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == dtype


def test_packed_weights_are_counted_individually(build, tiny_model):
    """Two 4-bit weights share a byte: counting bytes would make the adapter look twice as large."""
    plain = count_parameters(build(tiny_model, peft_config=random_lora()).model)
    packed = count_parameters(build(str(TINY_MODEL), peft_config=random_lora(), quantization_config=NF4).model)
    assert packed == plain
