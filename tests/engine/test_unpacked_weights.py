"""4-bit layers whose weights are dequantised once, against bitsandbytes' own forward: the same bits."""

import itertools
from contextlib import nullcontext

import psutil
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.unpacked_weights import WeightUnpacker
from grpo_ext.memory.counter import MemoryCounter
from grpo_ext.model.load import disable_4bit_repacking
from tests.tools.models import NF4, random_lora
from tests.tools.paths import TINY_MODEL
from tests.tools.scoring import prompts_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 12


def plenty():
    return 1e12


def layer_of(**settings):
    torch.manual_seed(0)
    layer = Linear4bit(128, 192, quant_type="nf4", **settings).to("cpu")  # quantised when it is moved
    disable_4bit_repacking(layer)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "flat"])
def test_outputs_have_the_same_bits(is_nested, autocast):
    for compute_dtype, input_dtype, has_bias in itertools.product((None, *DTYPES), DTYPES, (True, False)):
        layer = layer_of(compress_statistics=is_nested, compute_dtype=compute_dtype, bias=has_bias)
        x = torch.randn(3, 5, 128).to(input_dtype)
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            expected = layer(x)
            with WeightUnpacker(plenty).unpacked(layer):
                outputs = [layer(x) for _ in range(2)]
        for output in outputs:
            assert output.dtype == expected.dtype
            assert torch.equal(output, expected)


class Dequantisations(TorchDispatchMode):
    """Counts dequantised weights, in products and alone."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def qlora():
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, quantization_config=NF4, dtype=torch.float32)
    model = get_peft_model(base, random_lora()).eval()
    disable_4bit_repacking(model)
    return model


def sample(model):
    """Tokens and log-probs of 4 rows, and the number of dequantised weights."""
    ids, mask = prompts_of(20, 20)
    sampler = GroupSampler(temperature=0.8)
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": TOKENS, "eos_token_id": None}
    with Dequantisations() as dequantisations:
        model.generate(input_ids=ids, attention_mask=mask, custom_generate=sampler, **settings)
    return sampler.completions, dequantisations.count


def test_each_weight_is_dequantised_once_per_rollout_if_memory_allows(qlora, monkeypatch, caplog):
    caplog.set_level("INFO")
    layers = sum(isinstance(module, Linear4bit) for module in qlora.modules())
    unpacked, once = sample(qlora)
    assert once == 2 * layers  # in the prefill, and for all tokens after it
    assert "dequantised once per rollout" in caplog.text

    little = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    packed, per_token = sample(qlora)
    assert per_token == TOKENS * layers
    assert packed == unpacked


@torch.no_grad()
def test_nothing_is_held_afterwards():
    layer, x = layer_of(), torch.randn(5, 128)
    layer(x)
    with MemoryCounter() as counter:
        with WeightUnpacker(plenty).unpacked(layer):
            layer(x)
            assert counter.live == 128 * 192 * 4
        assert counter.live == 0
    layer.weight = layer_of().weight  # such as another checkpoint
    assert torch.equal(layer(x), layer_of()(x))


@torch.no_grad()
def test_a_replaced_forward_stays():
    layer, x = layer_of(), torch.randn(5, 128)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    expected = layer(x)
    with WeightUnpacker(plenty).unpacked(layer):
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
