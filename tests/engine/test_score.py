"""Shared scoring against TRL's plain path, in float64, on tiny random models of every supported architecture."""

import pytest
import torch
import transformers
from peft import get_peft_model
from trl.trainer.utils import add_fused_lm_head

from grpo_ext.engine.batch import ScoringBatch, Siblings, find_siblings, join_equal_lengths, split_into_chunks
from grpo_ext.engine.install import install_shared_scoring
from grpo_ext.model.unwrap import base_of
from tests.conftest import random_lora

TEMPERATURE = 0.8
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
DELTA_RULE = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 40}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "falcon_h1": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 1.5},
    ),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "attn_pdrop": 0,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "logits_scaling": 0.5,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "qwen3_next": (
        "Qwen3Next",
        DELTA_RULE | {"num_experts": 0, "mlp_only_layers": [0, 1]},
    ),
    "qwen3_5_text": ("Qwen3_5Text", DELTA_RULE),
}


def make(architecture, attention="eager", dtype=torch.float64):
    name, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**TINY | changes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name.removesuffix('Text')}ForCausalLM")
    lm = getattr(transformers, class_name)(config)
    for parameter in lm.parameters():  # flat initial weights would make every distribution alike
        parameter.data += 0.05 * torch.randn_like(parameter)
    add_fused_lm_head(lm, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    install_shared_scoring(lm)
    lora = {"falcon_h1": ["q_proj", "v_proj", "in_proj", "up_proj"]}.get(architecture, "all-linear")
    model = get_peft_model(lm, random_lora(target_modules=lora))
    return model.to(dtype)


def batch(prompt_lengths=(150, 90), lengths=((12, 7, 1, 9), (5, 12, 0, 3)), seed=1):
    """[prompt | completion] as TRL pads them: prompts on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    S, C = max(prompt_lengths), max(max(group) for group in lengths)
    ids, mask = [], []
    for prompt_length, group in zip(prompt_lengths, lengths, strict=True):
        prompt = torch.randint(2, 61, (prompt_length,), generator=generator)
        for length in group:
            completion = torch.randint(2, 61, (length,), generator=generator)
            row = torch.zeros(S + C, dtype=torch.long)
            row[S - prompt_length : S], row[S : S + length] = prompt, completion
            keep = torch.zeros(S + C, dtype=torch.long)
            keep[S - prompt_length : S + length] = 1
            ids.append(row)
            mask.append(keep)
    order = torch.randperm(len(ids), generator=generator)
    return torch.stack(ids)[order], torch.stack(mask)[order], C


def plain(model, ids, mask, C):
    """TRL's own scoring, row by row without padding on the left. With it, eager attention in float64 would turn padded
    positions into NaN, and models with absolute positions would see shifted ones."""
    outputs = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        kept = torch.cat([row_mask[:-C], torch.ones_like(row_mask[-C:])]).bool()
        row_ids, row_mask = row_ids[kept].unsqueeze(0), row_mask[kept].unsqueeze(0)
        labels = row_ids.masked_fill(row_mask == 0, -100)
        labels[:, :-C] = -100
        output = model(input_ids=row_ids, attention_mask=row_mask, labels=labels, fused_lm_head=True)
        outputs.append((output.log_probs[:, -C:], output.entropy[:, -C:]))
    return tuple(torch.cat(kind) for kind in zip(*outputs, strict=True))


def rows_of(ids, mask, C, **settings):
    siblings = find_siblings(ids, mask, C)
    return ScoringBatch(
        completion_ids_BC=ids[:, -C:], groups=siblings, temperatures=[TEMPERATURE] * len(ids), **settings
    )


def shared(model, ids, mask, C, **settings):
    scores = model(scoring_batch=rows_of(ids, mask, C, **settings))
    return scores.logps_BC, scores.entropies_BC


def gradients(model, outputs, seed=2, **options):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    loss = sum((output.double() * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), **options), strict=True))


# Parts of these always run in float32: the scans of mamba and delta-rule layers, and experts on a CPU.
IN_FLOAT32 = ("falcon_h1", "granitemoehybrid", "qwen3_moe", "qwen3_next", "qwen3_5_text")
CASES = [
    (architecture, attention, chunk_tokens)
    for architecture in ARCHITECTURES
    for attention in (("eager",) if architecture == "gemma2" else ("eager", "sdpa"))  # gemma2 has no sdpa
    for chunk_tokens in (None, 64)
]


@pytest.mark.parametrize(("architecture", "attention", "chunk_tokens"), CASES)
def test_equals_trl(architecture, attention, chunk_tokens):
    """In float64: log-probs and entropies to 1e-6 (the fused head runs in float32), and the gradient of every adapter
    tensor to 1e-6 relative. If parts of the model run in float32: 5e-5, which is their rounding; with the delta rule of
    qwen3_next and qwen3_5_text in float64, the gradients of one graph agree to 1e-13."""
    model = make(architecture, attention, torch.float32 if architecture == "qwen3_moe" else torch.float64)
    bound = 5e-5 if architecture in IN_FLOAT32 else 1e-6
    inputs = batch()
    want = plain(model, *inputs)
    got = shared(model, *inputs, chunk_tokens=chunk_tokens)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=bound, rtol=0)
    wanted = gradients(model, want)
    for name, grad in gradients(model, got).items():
        assert wanted[name].norm() > 0, name
        error = (grad - wanted[name]).norm() / wanted[name].norm()
        assert error < bound, (name, error.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_in_lower_precision(dtype):
    """float32: 2e-5 nats, and gradients to 1e-4 relative. bfloat16 has 8 bits of precision: 0.1 nats."""
    model = make("llama", "sdpa", dtype)
    inputs = batch()
    want, got = plain(model, *inputs), shared(model, *inputs, chunk_tokens=64)
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
        ((5, 60, 9), ((2,), (7, 1, 0, 5), (0, 1))),  # parts of groups
    ],
)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 30])
def test_shapes_of_groups(prompt_lengths, lengths, chunk_tokens):
    model = make("llama", "sdpa")
    inputs = batch(prompt_lengths, lengths)
    want, got = plain(model, *inputs), shared(model, *inputs, chunk_tokens=chunk_tokens, max_rows=3)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=0)
    wanted = gradients(model, want)
    for name, grad in gradients(model, got).items():
        assert (grad - wanted[name]).norm() < 1e-6 * wanted[name].norm(), name


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
    assert join_equal_lengths([one, two, three], 4, 20) == [two, joined]
    assert join_equal_lengths([one, two, three], 3, None) == [two, one, three]
    assert join_equal_lengths([one, two, three], None, 19) == [two, one, three]


def test_chunks_are_limited_by_prompt_and_completion_tokens():
    siblings = Siblings(((1,) * 10,), (0, 1, 2, 3, 4), (30, 10, 10, 2, 0), (0,) * 5)
    assert split_into_chunks(siblings, None, None) == [range(4)]
    assert split_into_chunks(siblings, 3, None) == [range(3), range(3, 4)]
    assert split_into_chunks(siblings, None, 45) == [range(1), range(1, 3), range(3, 4)]  # 40, 2 x 20, 12
    assert split_into_chunks(siblings, None, 1) == [range(i, i + 1) for i in range(4)]


def test_a_checkpointed_model_keeps_its_prompt():
    """Checkpointed layers drop the cache with one log line, in the forward and in the recomputation."""
    model = make("llama", "sdpa")
    inputs = batch()
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
    model = make("qwen3_moe", "sdpa", torch.float32)
    ids, mask, C = batch(prompt_lengths, lengths)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-C] = -100
    want = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, output_router_logits=True)
    got = model(scoring_batch=rows_of(ids, mask, C, chunk_tokens=chunk_tokens, experts_per_token=2))
    torch.testing.assert_close(got.aux_loss, want.aux_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.logps_BC, want.log_probs[:, -C:], atol=5e-5, rtol=0)
    outputs, wanted = [got.logps_BC, got.aux_loss.unsqueeze(0) * 10], [want.log_probs[:, -C:], want.aux_loss[None] * 10]
    for alone, alone_wanted in ((outputs, wanted), (outputs[1:], wanted[1:])):
        options = {"retain_graph": True, "materialize_grads": True}  # the last layers have no share in the loss alone
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
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon_h1", "granitemoehybrid"])
def test_exact_kl(architecture, chunk_tokens):
    """Value and gradient against the sum over the vocabulary from plain logits. One of the models has a softcap on its
    logits, two have a factor on them."""
    model = make(architecture, dtype=torch.float64)
    factors = {
        "gemma2": "final_logit_softcapping",
        "falcon_h1": "lm_head_multiplier",
        "granitemoehybrid": "logits_scaling",
    }
    if architecture in factors:
        assert getattr(model.config, factors[architecture]) not in (None, 1.0)
    ids, mask, C = batch()
    with torch.no_grad(), model.disable_adapter():
        reference = model(scoring_batch=rows_of(ids, mask, C, with_hidden=True)).hidden_BCH
        logps_ref = whole_distributions(model, ids, mask, C)
    got = model(scoring_batch=rows_of(ids, mask, C, chunk_tokens=chunk_tokens, ref_hidden_BCH=reference)).kls_BC
    logps = whole_distributions(model, ids, mask, C)
    want = (logps.exp() * (logps - logps_ref)).sum(dim=-1) * mask[:, -C:]
    assert want.max() > 0.01
    bound = 5e-5 if architecture in IN_FLOAT32 else 2e-6
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=0)
    wanted = gradients(model, [want])
    for name, grad in gradients(model, [got]).items():
        assert (grad - wanted[name]).norm() < 10 * bound * wanted[name].norm(), name
