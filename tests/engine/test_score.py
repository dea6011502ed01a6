"""Shared scoring against TRL's plain path, in float64, on tiny random models of every supported architecture."""

import inspect

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grpo_ext.engine.batch import Siblings, find_siblings, join_equal_lengths, split_into_chunks
from grpo_ext.engine.lm_head import TiledHead
from grpo_ext.model.unwrap import base_of
from tests.tools.architectures import ARCHITECTURES, IN_FLOAT32, TEMPERATURE, TINY, attentions, random_model
from tests.tools.lanes import slow_but
from tests.tools.scoring import gradients, padded_batch, score_by_trl, scoring_batch_of


def shared(model, ids, mask, C, **settings):
    scores = model(scoring_batch=scoring_batch_of(ids, mask, C, **settings))
    return scores.logps_BC, scores.entropies_BC


@pytest.mark.parametrize(
    ("architecture", "attention"),
    attentions([("llama", "sdpa"), ("gemma3", "eager"), ("qwen3_next", "sdpa")]),
)
def test_equals_trl(architecture, attention):
    """In float64: log-probs and entropies to 1e-6 (the fused head runs in float32), and the gradient of every adapter
    tensor to 1e-6 relative. If parts of the model run in float32: 5e-5, which is their rounding; with the delta rule of
    qwen3_next and qwen3_5_text in float64, the gradients of one graph agree to 1e-13."""
    model = random_model(architecture, attention)
    bound = 5e-5 if architecture in IN_FLOAT32 else 1e-6
    inputs = padded_batch()
    want = score_by_trl(model, *inputs)
    wanted = gradients(model, want)
    for chunk_tokens in (None, 64):
        got = shared(model, *inputs, chunk_tokens=chunk_tokens)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=bound, rtol=0)
        for name, grad in gradients(model, got).items():
            assert wanted[name].norm() > 0, name
            error = (grad - wanted[name]).norm() / wanted[name].norm()
            assert error < bound, (name, chunk_tokens, error.item())


FACTORS = [
    {},
    {"logit_scale": None},
    {"logit_scale": 0.0},
    {"logit_scale": 0.0625, "final_logit_softcapping": 30.0},
    {"output_multiplier": 3.0},
    {"lm_head_multiplier": 0.5},
    {"logits_scaling": 8.0},
    {"logits_scaling": 8.0, "model_type": "hyperclovax"},
    {"logit_scale": None, "lm_head_multiplier": 0.5, "logits_scaling": 8.0},
]


@pytest.mark.parametrize("factors", [*FACTORS, *ARCHITECTURES], ids=str)
def test_logits_are_scaled_as_trl_scales_them(factors):
    """The softcap and the factor of each family, as TRL reads them: it keeps both in the closure of its forward."""
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1))
    if isinstance(factors, str):
        name, changes = ARCHITECTURES[factors]
        lm.config = getattr(transformers, f"{name}Config")(**TINY | changes)
    else:
        lm.config.__dict__.update(factors)
    add_fused_lm_head(lm)
    read_by_trl = inspect.getclosurevars(lm.forward).nonlocals
    head = TiledHead.of(lm)
    assert head.softcap == read_by_trl["final_logit_softcapping"]
    assert head.scale == read_by_trl["logit_scale"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_in_lower_precision(dtype):
    """float32: 2e-5 nats, and gradients to 1e-4 relative. bfloat16 has 8 bits of precision: 0.1 nats."""
    model = random_model("llama", "sdpa", dtype)
    inputs = padded_batch()
    want, got = score_by_trl(model, *inputs), shared(model, *inputs, chunk_tokens=64)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-5 if dtype == torch.float32 else 0.1, rtol=0)
    if dtype == torch.float32:
        wanted = gradients(model, want)
        for name, grad in gradients(model, got).items():
            assert (grad - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("prompt_lengths", "lengths"),
    [
        ((150,), ((12,),)),  # G = 1
        ((1, 3), ((4, 2), (3, 0))),  # a prompt of one token, an empty completion
        ((40, 40), ((3, 3), (3, 3))),  # nothing ragged
        ((5, 60, 9), ((2,), (7, 1, 0, 5), (0, 1))),  # incomplete groups
    ],
)
def test_shapes_of_groups(prompt_lengths, lengths):
    model = random_model("llama", "sdpa")
    inputs = padded_batch(prompt_lengths, lengths)
    want = score_by_trl(model, *inputs)
    wanted = gradients(model, want)
    for chunk_tokens in (None, 1, 30):
        got = shared(model, *inputs, chunk_tokens=chunk_tokens, max_rows=3)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-6, rtol=0)
        for name, grad in gradients(model, got).items():
            assert (grad - wanted[name]).norm() < 1e-6 * wanted[name].norm(), (name, chunk_tokens)


def test_equal_prompts_are_found_despite_their_padding():
    """Duplicates, padding on either side and fully masked completions; holes are refused."""
    ids = torch.tensor([[0, 5, 6, 7, 7], [5, 6, 0, 8, 9], [0, 6, 5, 7, 0], [0, 5, 6, 7, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    assert find_siblings(ids, mask, 2) == [
        Siblings(prompts=((5, 6),), rows=(1, 0, 3), lengths=(2, 1, 0), prompt_indices=(0, 0, 0)),
        Siblings(prompts=((6, 5),), rows=(2,), lengths=(1,), prompt_indices=(0,)),
    ]
    mask[0, 3:] = torch.tensor([0, 1])
    assert find_siblings(ids, mask, 2) is None
    mask[0] = torch.tensor([0, 0, 0, 1, 1])
    assert find_siblings(ids, mask, 2) is None


def test_groups_with_prompts_of_equal_length_are_joined():
    """Joined within the limits; each row keeps its own prompt, and the longest rows come first."""
    one = Siblings(prompts=((5, 6),), rows=(0, 2), lengths=(3, 1), prompt_indices=(0, 0))
    two = Siblings(prompts=((7,),), rows=(1,), lengths=(2,), prompt_indices=(0,))
    three = Siblings(prompts=((8, 9),), rows=(4, 3), lengths=(2, 2), prompt_indices=(0, 0))
    joined = Siblings(prompts=((5, 6), (8, 9)), rows=(0, 4, 3, 2), lengths=(3, 2, 2, 1), prompt_indices=(0, 1, 1, 0))
    assert join_equal_lengths([one, two, three], None, None) == [two, joined]
    assert join_equal_lengths([one, two, three], 4, 24) == [two, joined]
    assert join_equal_lengths([one, two, three], 3, None) == [two, one, three]
    assert join_equal_lengths([one, two, three], None, 23) == [two, one, three]


def test_chunks_are_limited_by_prompt_and_completion_tokens():
    siblings = Siblings(((1,) * 10,), (0, 1, 2, 3, 4), (30, 10, 10, 2, 0), (0,) * 5)
    assert split_into_chunks(siblings, None, None) == [range(4)]
    assert split_into_chunks(siblings, 3, None) == [range(3), range(3, 4)]
    assert split_into_chunks(siblings, None, 45) == [range(1), range(1, 3), range(3, 4)]  # 40, 2 x 20, 12
    assert split_into_chunks(siblings, None, 1) == [range(i, i + 1) for i in range(4)]


def test_a_checkpointed_model_keeps_its_prompt():
    """Checkpointed layers drop the cache with one log line, in the forward and in the recomputation."""
    model = random_model("llama", "sdpa")
    inputs = padded_batch()
    want = shared(model, *inputs)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    got = shared(model, *inputs, chunk_tokens=64)
    assert base_of(model).is_gradient_checkpointing
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=0)
    wanted = gradients(model, want)
    for name, grad in gradients(model, got).items():
        assert (grad - wanted[name]).norm() < 1e-6 * wanted[name].norm(), name


@pytest.mark.parametrize("chunk_tokens", [None, 64])
@pytest.mark.parametrize(
    ("prompt_lengths", "lengths"),
    [
        ((150, 90), ((12, 7, 1, 9), (5, 12, 3))),
        ((40, 40, 1), ((3, 0, 3), (5, 3), (2, 4))),  # an empty completion, a prompt of one token
        ((30, 20), ((4, 2), (0, 0))),  # a prompt whose completions are all empty
    ],
)
def test_load_balancing_loss_of_experts(prompt_lengths, lengths, chunk_tokens):
    """transformers counts a prompt's tokens once per row, including empty rows, and the last token of each completion;
    so do we, although each prompt runs once. Compared on a padded batch: the value, and every adapter's gradient."""
    model = random_model("qwen3_moe", "sdpa")
    ids, mask, C = padded_batch(prompt_lengths, lengths)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-C] = -100
    want = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, output_router_logits=True)
    got = model(scoring_batch=scoring_batch_of(ids, mask, C, chunk_tokens=chunk_tokens, experts_per_token=2))
    torch.testing.assert_close(got.aux_loss, want.aux_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.logps_BC, want.log_probs[:, -C:], atol=5e-5, rtol=0)
    outputs, wanted = [got.logps_BC, got.aux_loss.unsqueeze(0) * 10], [want.log_probs[:, -C:], want.aux_loss[None] * 10]
    for alone, alone_wanted in ((outputs, wanted), (outputs[1:], wanted[1:])):
        options = {"retain_graph": True, "materialize_grads": True}  # the last layers do not affect aux_loss
        expected, received = gradients(model, alone_wanted, **options), gradients(model, alone, **options)
        assert any(grad.norm() > 0 for grad in expected.values())
        for name, grad in received.items():
            assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-9, name


def whole_distributions(model, ids, mask, C):
    """Log-probs of the whole vocabulary at every completion token, from plain logits, row by row; shape (B, C, V)."""
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        prompt = row_ids[:-C][row_mask[:-C].bool()]
        logits = model(input_ids=torch.cat([prompt, row_ids[-C:]]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        rows.append((logits / TEMPERATURE).log_softmax(dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_tokens", [None, 64])
@pytest.mark.parametrize(
    "architecture", slow_but(["llama", "gemma2", "falcon_h1", "granitemoehybrid"], ["llama", "gemma2"])
)
def test_exact_kl(architecture, chunk_tokens):
    """Value and gradient against the sum over the vocabulary, from plain logits. One of the models has a softcap on its
    logits, and two scale them."""
    model = random_model(architecture, dtype=torch.float64)
    factors = {
        "gemma2": "final_logit_softcapping",
        "falcon_h1": "lm_head_multiplier",
        "granitemoehybrid": "logits_scaling",
    }
    if architecture in factors:
        assert getattr(model.config, factors[architecture]) not in (None, 1.0)
    ids, mask, C = padded_batch()
    with torch.no_grad(), model.disable_adapter():
        reference = model(scoring_batch=scoring_batch_of(ids, mask, C, with_hidden=True)).hidden_BCH
        logps_ref = whole_distributions(model, ids, mask, C)
    batch = scoring_batch_of(ids, mask, C, chunk_tokens=chunk_tokens, ref_hidden_BCH=reference)
    got = model(scoring_batch=batch).kls_BC
    logps = whole_distributions(model, ids, mask, C)
    want = (logps.exp() * (logps - logps_ref)).sum(dim=-1) * mask[:, -C:]
    assert want.max() > 0.01
    bound = 5e-5 if architecture in IN_FLOAT32 else 2e-6
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=0)
    wanted = gradients(model, [want])
    for name, grad in gradients(model, [got]).items():
        assert (grad - wanted[name]).norm() < 10 * bound * wanted[name].norm(), name
