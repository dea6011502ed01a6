"""LoRA on the LM head against the unfused computation: full logits of PEFT's own forward, and autograd."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from grpo_ext import GRPOExtConfig
from grpo_ext.engine.install import install_shared_scoring
from grpo_ext.engine.lm_head import HeadLoRA, LogitScale, score_with_lora
from grpo_ext.model.lm_head_lora import why_head_untrainable
from grpo_ext.model.reference import REFERENCE, update_reference
from tests.tools.architectures import TEMPERATURE, TINY
from tests.tools.models import random_lora, small_llama, small_shape
from tests.tools.paths import TINY_MODEL
from tests.tools.scoring import gradients, padded_batch, scoring_batch_of
from tests.tools.training import adapter_of, log_of

TARGETS = ["q_proj", "up_proj", "lm_head"]
IDS = torch.tensor([[5, 9, 14, 3, 22, 7]])


# Tiled scoring


def problem(T=13, V=29, H=6, R=3, *, bias=True, dtype=torch.float64):
    """Hidden states, A and B with gradients; a frozen head; targets in every tile and on tile edges."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((T, H), (R, H), (V, R))]
    head = torch.nn.Linear(H, V, bias=bias).to(dtype).requires_grad_(False)
    return leaves, head, torch.randint(V, (T,)).index_fill(0, torch.tensor([0]), V - 1)


def tiled(leaves, head, targets, scale, tile, with_entropies=True):
    hidden, A, B = leaves
    lora = HeadLoRA(hidden @ A.T * 0.7, B)
    return score_with_lora(hidden, head, lora, targets, scale, with_entropies=with_entropies, tile=tile)


def whole(leaves, head, targets, scale):
    hidden, A, B = leaves
    logits = (head(hidden) + hidden @ A.T @ B.T * 0.7) * scale.scale
    if scale.softcap is not None:
        logits = torch.tanh(logits / scale.softcap) * scale.softcap
    logps = (logits / scale.temperature).log_softmax(dim=1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(dim=1)


@pytest.mark.parametrize("tile", [(4096, 32768), (4, 10), (1, 1), (5, 29)])
@pytest.mark.parametrize(
    ("scale", "bias"),
    [
        (LogitScale(1.0, None, 1.0), False),
        (LogitScale(0.8, None, 1.7), True),
        (LogitScale(1.3, 2.0, 0.6), True),
        (LogitScale(0.7, 3.0, 1.5), False),
    ],
)
def test_tiles_equal_full_logits(tile, scale, bias):
    """In float64, to 1e-10: values, and gradients of hidden states, A and B from log-probs, entropies and both."""
    leaves, head, targets = problem(bias=bias)
    got, want = tiled(leaves, head, targets, scale, tile), whole(leaves, head, targets, scale)
    weights = torch.randn(2, len(targets), dtype=torch.float64)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-10, rtol=0)
    for chosen in ([0], [1], [0, 1]):
        grads, wanted = (
            torch.autograd.grad(sum((scores[i] * weights[i]).sum() for i in chosen), leaves, retain_graph=True)
            for scores in (got, want)
        )
        for grad, expected in zip(grads, wanted, strict=True):
            assert expected.norm() > 0.01
            torch.testing.assert_close(grad, expected, atol=1e-10, rtol=0)
    alone, none = tiled(leaves, head, targets, scale, tile, with_entropies=False)
    assert none is None
    assert torch.equal(alone, got[0])


class Sizes(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return output


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_as_large_as_the_logits_or_the_weight(autocast):
    """No tensor of a pass exceeds the tile or the inputs, even if autocast would cast the whole weight."""
    leaves, head, targets = problem(T=200, V=1000, H=64, dtype=torch.float32)
    with Sizes() as sizes:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logps, entropies = tiled(leaves, head, targets, LogitScale(0.8, 5.0, 1.0), (50, 100))
        (logps + entropies).sum().backward()
    assert sizes.largest == 200 * 64  # the hidden states; the logits have 200 x 1000 numbers, the weight 1000 x 64
    assert head.weight.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_products_only(autocast):
    """Values and gradients against float64, to the 8 bits of bfloat16 logits. Sums over 64 tiles add no error; in
    bfloat16 they would add 3e-3 to the gradients."""
    leaves, head, targets = problem(T=64, V=512, H=64, dtype=torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = whole(exact, copy.deepcopy(head).double(), targets, LogitScale(0.8, None, 1.0))
    wanted = torch.autograd.grad((want[0] + want[1]).sum(), exact)
    if autocast:
        leaves, head = [leaf.detach().float().requires_grad_() for leaf in leaves], head.float()
    of_tiles = []
    for tile in ((64, 512), (8, 64)):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            got = tiled(leaves, head, targets, LogitScale(0.8, None, 1.0), tile)
        of_tiles.append(torch.autograd.grad((got[0] + got[1]).sum(), leaves))
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g.double(), w, atol=0.15, rtol=0.02)
    for one, many, expected, leaf in zip(*of_tiles, wanted, leaves, strict=True):
        assert one.dtype == leaf.dtype
        assert (one - expected).norm() < 0.02 * expected.norm()
        assert (one - many).norm() < 1e-3 * one.norm()


# Scoring with a model

ARCHITECTURES = {
    "llama": ("Llama", {}),
    "tied llama": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "granite": ("Granite", {"logits_scaling": 0.5}),
}


def make(architecture, **lora):
    name, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**TINY | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    lm = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in lm.parameters():  # flat initial weights would make every distribution alike
        parameter.data += 0.05 * torch.randn_like(parameter)
    add_fused_lm_head(lm, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    install_shared_scoring(lm)
    is_tied = lm.get_input_embeddings().weight is lm.lm_head.weight
    assert is_tied == (architecture in ("tied llama", "gemma2"))
    return get_peft_model(lm, random_lora(target_modules=TARGETS, **lora)).double()


def scored(model, inputs, **settings):
    scores = model(scoring_batch=scoring_batch_of(*inputs, **settings))
    return scores.logps_BC, scores.entropies_BC


def unfused(model, ids, mask, C):
    """Log-probs and entropies from the logits of PEFT's own forward, row by row, 0 on padding."""
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        prompt = row_ids[:-C][row_mask[:-C].bool()]
        logits = model(input_ids=torch.cat([prompt, row_ids[-C:]]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(dim=-1)
        chosen = logps.gather(1, row_ids[-C:].unsqueeze(1)).squeeze(1)
        rows.append(torch.stack([chosen, -(logps.exp() * logps).sum(dim=1)]) * row_mask[-C:])
    return torch.stack(rows).unbind(dim=1)


PATTERNS = {"rank_pattern": {"lm_head": 3}, "alpha_pattern": {"lm_head": 5}, "use_rslora": True}


@pytest.mark.parametrize("chunk_tokens", [None, 64])
@pytest.mark.parametrize(
    ("architecture", "lora"), [*((architecture, {}) for architecture in ARCHITECTURES), ("tied llama", PATTERNS)]
)
def test_equals_the_unfused_computation(architecture, lora, chunk_tokens):
    """In float64, to 1e-6 (norms and attention run in float32): log-probs, entropies, and the gradient of every adapter
    tensor. An adapter missing in scoring would give other values, one missing in the backward no gradient."""
    model = make(architecture, **lora)
    inputs = padded_batch(prompt_lengths=(40, 25))
    want, got = unfused(model, *inputs), scored(model, inputs, chunk_tokens=chunk_tokens)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=0)
    wanted, grads = gradients(model, want), gradients(model, got)
    assert sum("lm_head" in name for name in grads) == 2
    for name, grad in grads.items():
        assert wanted[name].norm() > 0, name
        assert (grad - wanted[name]).norm() < 1e-6 * wanted[name].norm(), name


def test_only_active_adapters_count():
    """Scores equal those of PEFT's own forward with the policy active, a reference, both, an adapter that is not on the
    head, or none. With the wrong adapters, the policy would be compared with itself or with another model."""
    model, inputs = make("tied llama"), padded_batch(prompt_lengths=(20,), lengths=((5, 3),))
    model.add_adapter(REFERENCE, random_lora(target_modules=TARGETS, r=2))
    model.add_adapter("body", random_lora(target_modules=["q_proj"]))
    model.double()
    seen = []

    def compare():
        want, got = unfused(model, *inputs), scored(model, inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, atol=1e-6, rtol=0)
        seen.append(want[0])

    with torch.no_grad():
        for names in (["default"], [REFERENCE], ["default", REFERENCE], ["body"]):
            model.base_model.set_adapter(names)
            compare()
        model.set_adapter("default")
        with model.disable_adapter():
            compare()
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_mixed_reference_is_scored_exactly(alpha):
    """After two updates of `ref`, which increase its rank on the head if they mix."""
    model, inputs = make("tied llama"), padded_batch(prompt_lengths=(20,), lengths=((5, 3),))
    head = model.base_model.model.lm_head
    want = torch.zeros_like(head.get_delta_weight("default"))
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        want = (1 - alpha) * want + alpha * head.get_delta_weight("default").detach()
        update_reference(model, alpha)
    torch.testing.assert_close(head.get_delta_weight(REFERENCE), want, atol=1e-6, rtol=0)
    assert head.lora_A[REFERENCE].weight.size(0) == (8 if alpha < 1 else 4)
    model.double()
    with torch.no_grad(), use_adapter(model, REFERENCE):
        for g, w in zip(scored(model, inputs), unfused(model, *inputs), strict=True):
            torch.testing.assert_close(g, w, atol=1e-6, rtol=0)


# In training


def small(tokenizer, *, tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**small_shape(tokenizer), tie_word_embeddings=tied))


@pytest.mark.parametrize(("tied", "chunk_tokens"), [(False, None), (True, 40)])
def test_a_step_equals_that_of_full_logits(build, tokenizer, tied, chunk_tokens):
    """One SGD step is the gradient of the loss, computed here from full logits of the same rows: the policy term, the
    entropy bonus, and the KL to the backbone without its adapters."""
    trainer = build(
        small(tokenizer, tied=tied),
        peft_config=random_lora(target_modules=TARGETS),
        optim="sgd",
        learning_rate=50.0,  # far beyond the rounding of the weights
        max_grad_norm=1e6,
        entropy_coef=0.3,
        beta=0.2,
        kl_estimator="k2",
        per_device_train_batch_size=16,
        chunk_tokens=chunk_tokens,
        max_steps=1,
    )
    start = adapter_of(trainer)
    trainer.train()
    after, model = adapter_of(trainer), trainer.model
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data = start[name].clone()
    (part,) = trainer._buffered_inputs
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
    mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
    C, mask_BC = part["completion_ids"].size(1), part["completion_mask"]

    def scores():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        logps = (logits[:, -C - 1 : -1] / 0.8).log_softmax(dim=-1)
        return logps.gather(2, ids[:, -C:].unsqueeze(2)).squeeze(2), -(logps.exp() * logps).sum(dim=-1)

    with torch.no_grad(), model.disable_adapter():
        reference, _ = scores()
    torch.testing.assert_close(part["ref_per_token_logps"] * mask_BC, reference * mask_BC, atol=1e-5, rtol=0)
    logps, entropies = scores()
    ratio = ((logps - logps.detach()) * mask_BC).sum(dim=1).exp()
    kl = ((logps - reference).square() / 2 * mask_BC).sum(dim=1)
    entropy = (entropies * mask_BC).sum(dim=1) / mask_BC.sum(dim=1)
    (-ratio * part["advantages"] + 0.2 * kl - 0.3 * entropy).mean().backward()
    assert sum("lm_head" in name for name in start) == 2
    for name, parameter in model.named_parameters():
        if name in start:
            moved = after[name] - start[name]
            assert moved.norm() > 0, name
            assert (moved + 50 * parameter.grad).norm() < 1e-3 * moved.norm(), name


@pytest.mark.parametrize("tied", [False, True])
def test_it_trains_from_the_base_and_only_the_adapter_is_saved(build, tokenizer, tied):
    """From B = 0: the KL at step 0 is zero, the reference remains the pristine base, sampling agrees with scoring, and
    the backbone does not change. The saved adapter contains neither head nor embedding, and plain PEFT on the plain
    base loads it as the policy."""
    base = small(tokenizer, tied=tied)
    pristine = copy.deepcopy(base)
    lora = random_lora(target_modules=TARGETS, init_lora_weights=True)
    trainer = build(base, peft_config=lora, beta=0.1, learning_rate=0.05, num_iterations=2, max_steps=6)
    trainer.train()
    trainer.save_model()
    head = trainer.model.base_model.model.lm_head
    assert head.lora_B["default"].weight.norm() > 0.1
    assert (head.base_layer.weight is trainer.model.get_input_embeddings().weight) == tied
    kl = log_of(trainer, "kl_sequence")
    assert abs(kl[0]) < 1e-9
    assert kl[-1] > 1e-3
    gaps = log_of(trainer, "sampling/logp_gap")
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(trainer.model(input_ids=IDS).logits, pristine(input_ids=IDS).logits)
    saved = load_file(Path(trainer.args.output_dir, "adapter_model.safetensors"))
    assert len(saved) == 10  # A and B of two linear layers in two blocks, and of the head
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    loaded = PeftModel.from_pretrained(pristine, trainer.args.output_dir)
    logits = loaded(input_ids=IDS).logits
    torch.testing.assert_close(logits, trainer.model(input_ids=IDS).logits, atol=1e-6, rtol=0)
    with loaded.disable_adapter():
        assert (logits - loaded(input_ids=IDS).logits).abs().max() > 0.1


def test_a_model_by_name_trains_like_a_model_object(build, tokenizer, tmp_path):
    """TRL loads the model in its constructor, and the run is the same. A regular expression selects the layers."""
    base = small(tokenizer, tied=True)
    base.save_pretrained(tmp_path / "base")
    load = grpo_trainer.create_model_from_path
    runs = []
    for model in (str(tmp_path / "base"), base):
        lora = random_lora(target_modules=r".*(up_proj|lm_head)", init_lora_weights=True)
        runs.append(build(model, peft_config=lora, beta=0.1))
        runs[-1].train()
    assert grpo_trainer.create_model_from_path is load
    by_name, given = map(adapter_of, runs)
    assert sum("lm_head" in name for name in by_name) == 2
    for name, value in given.items():
        assert torch.equal(by_name[name], value), name


def test_on_a_quantised_backbone(build):
    """4-bit quantisation does not change the head, and its adapter trains."""
    lora = random_lora(target_modules=["up_proj", "lm_head"])
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = build(str(TINY_MODEL), peft_config=lora, quantization_config=nf4, max_steps=1)
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    before = {name: value for name, value in adapter_of(trainer).items() if "lm_head" in name}
    assert {name.split(".")[-3] for name in before} == {"lora_A", "lora_B"}
    trainer.train()
    assert all(not torch.equal(adapter_of(trainer)[name], value) for name, value in before.items())


def test_training_continues_from_a_saved_adapter(build, tokenizer, tmp_path):
    """The reference is a frozen copy of the adapter, including its part on the head."""
    base = small(tokenizer, tied=True)
    get_peft_model(copy.deepcopy(base), random_lora(target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    start = model(input_ids=IDS).logits.detach()
    trainer = build(model, beta=0.1, learning_rate=0.1, max_steps=3)
    before = adapter_of(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())
    assert sum("lm_head" in name for name in before) == 2
    kl = log_of(trainer, "kl_sequence")
    assert abs(kl[0]) < 1e-9
    assert kl[2] > 1e-3
    with torch.no_grad(), use_adapter(trainer.model, REFERENCE):
        torch.testing.assert_close(trainer.model(input_ids=IDS).logits, start, atol=1e-6, rtol=0)


def test_the_reference_follows_the_head_too(build, tokenizer):
    """The policy is copied after every second step, so the next step's KL is zero again."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "max_steps": 3}
    lora = random_lora(target_modules=["lm_head"])
    trainer = build(small(tokenizer, tied=True), peft_config=lora, beta=0.1, learning_rate=0.05, **settings)
    trainer.train()
    kl = log_of(trainer, "kl")
    assert kl[2] < 1e-6 < kl[1]


def test_all_linear_leaves_the_head_out(build, small_model):
    trainer = build(small_model, peft_config=random_lora(target_modules="all-linear"))
    assert len(adapter_of(trainer)) == 2 * 7 * 2
    assert not any("lm_head" in name for name in adapter_of(trainer))


# Refusals


@pytest.mark.parametrize(
    ("message", "lora", "settings"),
    [
        ("it needs shared prompts.*Use share_prompt=True", {}, {"share_prompt": False}),
        ("it needs shared prompts", {"lora_dropout": 0.1}, {"disable_dropout": False}),
        ("Use LoRA without use_dora", {"use_dora": True}, {}),
        ("Use LoRA without use_dora, lora_bias", {"lora_bias": True}, {}),
        ('the weight or bias of its base layer is also trained. Use bias="none"', {"bias": "lora_only"}, {"beta": 0.0}),
        ("Use ensure_weight_tying=False", {"ensure_weight_tying": True}, {}),
        ("kl_estimator='exact' needs one LM head", {}, {"kl_estimator": "exact", "beta": 0.1}),
    ],
)
def test_what_cannot_be_trained_is_refused(build, tokenizer, message, lora, settings):
    base = small(tokenizer, tied=True)
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with pytest.raises(ValueError, match=message):
        build(base, peft_config=random_lora(target_modules=["lm_head"], **lora), **settings)


def test_layers_other_than_plain_lora_are_refused(build, tokenizer, tmp_path):
    loha = LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"its layer is peft\.tuners\.loha\.layer\.Linear\. Use LoRA on a head"):
        build(small_llama(tokenizer), peft_config=loha)
    config = LlamaConfig(**small_shape(tokenizer) | {"hidden_size": 128})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    with pytest.raises(ValueError, match=r"Linear4bit\. Use LoRA on a head that is not quantised"):
        build(str(tmp_path / "base"), peft_config=random_lora(target_modules=["lm_head"]), quantization_config=nf4)


def test_merged_weights_of_a_tied_head_are_refused(tokenizer, tmp_path):
    """vLLM would use the merged weights for the embedding as well."""
    args = GRPOExtConfig(str(tmp_path), use_cpu=True, bf16=False, use_vllm=True)
    for tied in (True, False):
        reason = why_head_untrainable(
            get_peft_model(small(tokenizer, tied=tied), random_lora(target_modules=TARGETS)), args
        )
        assert (reason is not None) == tied
        assert not tied or "Use use_vllm=False" in reason


def test_a_row_without_a_prompt_is_refused(build, tokenizer):
    """TRL's plain path would accept it and ignore the adapter."""
    trainer = build(small_llama(tokenizer), peft_config=random_lora(target_modules=["lm_head"]))
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="needs a prompt of at least one token in every row"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 2)
