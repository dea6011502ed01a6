"""LoRA with stacked factors against PEFT's own forward."""

from functools import partial

import pytest
import torch
from bitsandbytes import nn as bnb
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.stacked_lora import stacked_lora
from grpo_ext.memory.counter import MemoryCounter
from tests.tools.architectures import ARCHITECTURES, IN_FLOAT32, random_model
from tests.tools.lanes import slow_but
from tests.tools.models import random_lora
from tests.tools.scoring import prompts_of

FORWARDS = 3  # the first one shows which layers read the same tensor, and the second one stacks them


class Attention(nn.Module):
    """Three layers that read one tensor, and a fourth of the same width that reads another."""

    def __init__(self, linear):
        super().__init__()
        self.q, self.k, self.v, self.o = linear(64, 64), linear(64, 32), linear(64, 32), linear(64, 64)

    def forward(self, x):
        return self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], dim=-1))


def attention(seed=0, bits=None, **lora):
    linear = {
        None: nn.Linear,
        4: partial(bnb.Linear4bit, quant_type="nf4"),
        8: partial(bnb.Linear8bitLt, has_fp16_weights=False),
    }
    torch.manual_seed(seed)
    base = Attention(linear[bits]).to("cpu")  # bitsandbytes quantises when a layer is moved
    if bits is not None:
        setattr(base, f"is_loaded_in_{bits}bit", True)  # as transformers does
    return get_peft_model(base, random_lora(task_type=None, **lora)).eval()


@torch.no_grad()
def stacked_outputs(model, x):
    """The output of each forward in one context."""
    with stacked_lora(model):
        return [model(x) for _ in range(FORWARDS)]


@pytest.fixture
def x():
    return torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("architecture", slow_but(ARCHITECTURES, ["llama", "gpt2", "qwen3_next"]))
def test_logits_are_those_of_peft(architecture):
    """In float64 up to its own rounding, unless the architecture has parts that always run in float32."""
    model = random_model(architecture)
    ids, mask = prompts_of(20)
    tolerance = 1e-5 if architecture in IN_FLOAT32 else 1e-12
    expected = model(input_ids=ids, attention_mask=mask).logits
    with stacked_lora(model):
        for _ in range(FORWARDS):
            logits = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("architecture", slow_but(ARCHITECTURES, ["llama", "gemma3"]))
def test_tokens_are_those_of_transformers_in_float32(architecture, do_sample):
    model = random_model(architecture, dtype=torch.float32)
    ids, mask = prompts_of(40, 40)
    rows = []
    for sampler in ({}, {"custom_generate": GroupSampler(temperature=0.8)}):
        torch.manual_seed(0)
        settings = {"do_sample": do_sample, "temperature": 0.8, "top_k": 0, "max_new_tokens": 32} | sampler
        rows.append(model.generate(input_ids=ids, attention_mask=mask, **settings))
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("base_dtype", "is_autocast"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)],
    ids=["bfloat16 autocast", "bfloat16", "float32 autocast"],
)
@torch.no_grad()
def test_bfloat16_is_at_least_as_accurate_as_peft(x, base_dtype, is_autocast):
    """Errors against float64 of a float32 adapter. Its scaling is not a power of 2, so it rounds."""
    model = attention(lora_alpha=7)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else base_dtype)
    x = x.to(base_dtype)
    q, k = model.get_base_model().q, model.get_base_model().k
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        by_peft = [q(x), k(x)]
        with stacked_lora(model):
            for _ in range(FORWARDS):
                stacked = [q(x), k(x)]
    exact = [layer.double()(x.double()) for layer in (q, k)]
    for ours, theirs, expected in zip(stacked, by_peft, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error = (theirs - expected).square().mean()
        assert (ours - expected).square().mean() <= error * (1 + 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["no autocast", "autocast"])
def test_quantised_bases(x, bits, is_autocast):
    model = attention(bits=bits)
    layer = model.get_base_model().q
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        by_peft = layer(x)
        with stacked_lora(model):
            outputs = [layer(x) for _ in range(FORWARDS)]
    tolerance = 1e-2 if is_autocast else 1e-6
    with model.disable_adapter():
        assert (by_peft - layer(x)).abs().max() > 10 * tolerance, "the adapter changes nothing"
    for output in outputs:
        assert output.dtype == by_peft.dtype
        torch.testing.assert_close(output, by_peft, rtol=tolerance, atol=tolerance)


class _KernelCounter(TorchDispatchMode):
    """Counts operations that run a kernel; views do not."""

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns_view = any(
            returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns
        )
        self.kernels += not returns_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("is_autocast", [False, True], ids=["float32", "autocast"])
def test_kernels_per_forward(x, is_autocast):
    """Four layers, three of which read one tensor: two products with A, and four additions of a product with B. PEFT
    needs 16, or 24 under autocast."""
    model = attention()
    if is_autocast:
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast), stacked_lora(model):
        for _ in range(FORWARDS):
            with _KernelCounter() as stacked:
                model(x)
        with model.disable_adapter(), _KernelCounter() as base:
            model(x)
    assert stacked.kernels - base.kernels == 6


def without_adapter(model):
    model.base_model.disable_adapter_layers()


def with_two_adapters(model):
    model.add_adapter("second", random_lora(task_type=None))
    model.base_model.set_adapter(["default", "second"])


def with_patched_base(model):
    base = model.get_base_model().q.base_layer
    forward = base.forward
    base.forward = lambda x: forward(x) + 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("lora", "change"),
    [
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({"lora_dropout": 0.5}, lambda model: model.train()),
        ({"lora_dropout": 0.5}, None),
        ({"use_rslora": True}, None),
        ({}, lambda model: model.merge_adapter()),
        ({}, without_adapter),
        ({}, with_two_adapters),
        ({}, with_patched_base),
        ({}, lambda model: model.get_base_model().k.lora_A.register_forward_hook(lambda m, i, output: output)),
        (
            {},
            lambda model: (
                model.get_base_model().k.lora_A["default"].register_forward_hook(lambda m, i, output: -output)
            ),
        ),
        ({}, lambda model: model.get_base_model().k.register_forward_hook(lambda m, i, output: -output)),
    ],
    ids=[
        "DoRA",
        "biases",
        "dropout",
        "no dropout in evaluation",
        "rsLoRA",
        "merged",
        "disabled",
        "two adapters",
        "patched forward",
        "hook on a container",
        "hook on A",
        "hook on the layer",
    ],
)
def test_whatever_else_a_layer_does_is_kept(x, lora, change):
    model = attention(**lora)
    if change is not None:
        change(model)
    torch.manual_seed(1)
    expected = [model(x) for _ in range(FORWARDS)]
    torch.manual_seed(1)
    for output, by_peft in zip(stacked_outputs(model, x), expected, strict=True):
        torch.testing.assert_close(output, by_peft, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_outputs_seen_by_a_hook_are_not_modified_later(x):
    """The product with B is added in place, but not to a tensor that somebody else may hold."""
    model = attention()
    base = model.get_base_model().q.base_layer
    expected, seen = base(x), []
    hook = base.register_forward_hook(lambda m, i, output: seen.append(output))
    stacked_outputs(model, x)
    hook.remove()
    assert all(torch.equal(output, expected) for output in seen)


@torch.no_grad()
def test_the_adapter_is_disabled_and_switched_inside(x):
    """A logits processor may compare the policy with its base, for example."""
    model = attention()
    model.add_adapter("second", random_lora(task_type=None))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(x)
    with model.disable_adapter():
        without = model(x)
    model.set_adapter("default")
    with stacked_lora(model):
        for _ in range(FORWARDS):
            torch.testing.assert_close(model(x), expected["default"])
            with model.disable_adapter():
                assert torch.equal(model(x), without)
            model.set_adapter("second")
            assert torch.equal(model(x), expected["second"])
            model.set_adapter("default")


@torch.no_grad()
def test_layers_that_read_the_same_tensor_only_sometimes(x):
    """An equal tensor, the same one with other values, one of another shape: never the product of an earlier one."""
    model = attention()
    q, k = model.get_base_model().q, model.get_base_model().k
    changed = x.clone()
    expected = q(x), k(x), k(x + 1), k(x[:2])
    with stacked_lora(model):
        for _ in range(FORWARDS):
            outputs = [q(x), k(x)]
            outputs.append((q(changed), changed.add_(1), k(changed), changed.sub_(1))[2])
            outputs.append((q(x), k(x[:2]))[1])
            for output, by_peft in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, by_peft, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_is_as_before_even_after_an_error(x):
    model, other = attention(), attention(seed=1)
    expected, expected_other = model(x), other(x)
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def sample_and_fail():
        with stacked_lora(model), stacked_lora(other), stacked_lora(model):
            for _ in range(FORWARDS):
                torch.testing.assert_close(model(x), expected)
                torch.testing.assert_close(other(x), expected_other)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sample_and_fail()
    assert torch.equal(model(x), expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, value in model.state_dict().items():
        assert value.data_ptr() == state[name][0]
        assert torch.equal(value, state[name][1])


@torch.no_grad()
def test_an_inner_context_leaves_the_outer_one_in_place(x):
    model = attention()
    with stacked_lora(model):
        for _ in range(FORWARDS):
            model(x)
        with _KernelCounter() as before:
            model(x)
        with stacked_lora(model):
            model(x)
        with _KernelCounter() as after:
            model(x)
    assert before.kernels == after.kernels


@torch.no_grad()
def test_memory_is_that_of_one_copy_of_the_adapter_and_is_released(x):
    model = attention()
    adapter = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    with MemoryCounter() as counter:
        with stacked_lora(model):
            for _ in range(FORWARDS):
                model(x)
            assert counter.live < adapter + 2 * x.nbytes
        assert counter.live == 0
