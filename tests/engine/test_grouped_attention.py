"""Grouped-query attention without copies, compared with transformers' `sdpa`, which repeats keys and values."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_ext.engine import grouped_attention
from grpo_ext.engine.grouped_attention import attend_folded, attend_grouped

B, KV, N, C, T, D = 2, 3, 4, 7, 40, 16


class Layer(nn.Module):
    """What `sdpa` reads of an attention layer."""

    num_key_value_groups = N
    is_causal = True


def tensors(dtype):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(B, heads, tokens, D, dtype=dtype, requires_grad=True)
        for heads, tokens in ((KV * N, C), (KV, T), (KV, T))
    )
    sees_cT = torch.rand(B, 1, C, T) < 0.6
    sees_cT[..., 0] = True
    return query, key, value, sees_cT


def masks(sees, dtype):
    return {"bool": sees, "float": torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)}


def attention(query, key, value, mask):
    """What a model's layer calls."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(), query, key, value, mask, dropout=0.0, scaling=0.3)[0]


def result(function, *inputs):
    """Output and gradients, and the bytes that the graph holds."""
    held = {}

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, torch.autograd.grad((output * weights).sum(), inputs[:3]), sum(held.values())


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_equals_repeated_keys_and_values(dtype, kind):
    """The output to the bit, the gradients up to the order in which those of a group are summed."""
    *inputs, sees = tensors(dtype)
    mask = masks(sees, dtype)[kind]
    output, grads, held = result(attention, *inputs, mask)
    with grouped_attention.grouped_attention():
        ours, our_grads, ours_held = result(attention, *inputs, mask)
    assert torch.equal(ours, output)
    for grad, our_grad in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(our_grad, grad, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert ours_held < held - 1.9 * (N - 1) * B * KV * T * D * inputs[0].element_size(), "keys or values were copied"


def test_folded_heads_equal_grouped_ones():
    """Folding is for devices where `enable_gqa` has no fast kernel under a mask. Here it runs on the CPU."""
    *inputs, sees = tensors(torch.float64)
    mask = masks(sees, torch.float64)["float"]
    grouped, grads, _ = result(lambda *inputs: attend_grouped(*inputs, scale=0.3), *inputs, mask)
    mask = mask.repeat(1, 1, N, 1)
    folded, folded_grads, _ = result(lambda *inputs: attend_folded(*inputs, scale=0.3), *inputs, mask)
    for got, expected in zip((folded, *folded_grads), (grouped, *grads), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_what_cannot_be_grouped_is_left_to_transformers():
    """No mask, a mask per head, or a single query token, for which transformers copies nothing."""
    *inputs, sees = tensors(torch.float32)
    query, key, value = inputs
    per_head = sees.repeat(1, KV * N, 1, 1)
    for arguments in (
        (query, key, value, None),
        (query, key, value, per_head),
        (query[:, :, :1], key, value, sees[:, :, :1]),
    ):
        expected = attention(*arguments)
        with grouped_attention.grouped_attention():
            assert torch.equal(attention(*arguments), expected)


def test_an_attention_of_the_user_stays():
    def own(module, query, key, value, attention_mask, **options):
        return query * 0, None

    *inputs, sees = tensors(torch.float32)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with grouped_attention.grouped_attention():
            assert not attention(*inputs, sees).any()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
