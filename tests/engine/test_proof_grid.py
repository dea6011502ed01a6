"""Gradients of whole losses on shared prompts equal those of TRL's plain path, for every adapter tensor."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.tools.architectures import ARCHITECTURES, TINY
from tests.tools.lanes import slow_but
from tests.tools.models import NF4, random_lora
from tests.tools.paths import TINY_MODEL
from tests.tools.reward_functions import PROMPTS
from tests.tools.scoring import padded_batch

# Full attention; a sliding window shorter than the prompt; a recurrent layer with an attention layer.
# gemma2 does not support sdpa. Its eager attention returns NaN on left padding, so all prompts have the same length.
ATTENTION = {"llama": "sdpa", "gemma2": "eager", "qwen3_5_text": "sdpa"}
# Log-ratios of the eight rows: beyond the clip on both sides, and within it, for both signs of the advantage.
SHIFTS = torch.tensor([1.5, -1.5, 0.1, -0.1, 1.5, -1.5, 0.1, -0.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.2, 0.8, 1.1, -1.0, -0.9, -1.2, -0.8], dtype=torch.float64)


def trainer_on(model, folder, **options):
    """A trainer without dropout and accumulation; the tests build the inputs of its losses."""
    trainer = GRPOExtTrainer(
        model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=GRPOExtConfig(
            output_dir=str(folder),
            num_generations=4,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            reward_workers=0,
            guards=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
        peft_config=random_lora(),
        **options,
    )
    assert trainer.shares_prompts
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def share_prompts(trainer, on):
    scorer = dataclasses.replace(trainer.parts.scorer, shares_prompts=on)
    trainer.parts = dataclasses.replace(trainer.parts, scorer=scorer)


@pytest.fixture(scope="module", params=slow_but(ATTENTION, ["llama"]))
def case(request, tmp_path_factory):
    """A trainer on a tiny model in float64, and inputs of its losses: two groups of four on prompts of 150 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        # The recurrent layer always casts to float32, which would hide errors below 1e-5.
        in_float64 = SimpleNamespace(**vars(torch) | {"float32": torch.float64})
        patch.setattr(modeling_qwen3_5, "torch", in_float64)
        name, changes = ARCHITECTURES[request.param]
        config = getattr(transformers, f"{name}Config")(**TINY | changes)
        config._attn_implementation = ATTENTION[request.param]
        torch.manual_seed(0)
        lm = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        for parameter in lm.parameters():  # flat initial weights would make every distribution alike
            parameter.data += 0.05 * torch.randn_like(parameter)
        trainer = trainer_on(lm, tmp_path_factory.mktemp("grid"))
        trainer.model.to(torch.float64)

        ids, mask, completion = padded_batch((150, 150), ((12, 7, 9, 5), (5, 12, 8, 3)))
        share_prompts(trainer, False)
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completion)
        generator = torch.Generator().manual_seed(3)
        mask_BC = mask[:, -completion:]
        noise = 0.3 * torch.randn(logps.shape, generator=generator, dtype=torch.float64) * mask_BC
        noise -= noise.sum(dim=1, keepdim=True) * mask_BC / mask_BC.sum(dim=1, keepdim=True)  # sums to 0 per row
        shifts = (SHIFTS.unsqueeze(1) * mask_BC / mask_BC.sum(dim=1, keepdim=True) + noise) * mask_BC
        inputs = {
            "prompt_ids": ids[:, :-completion],
            "prompt_mask": mask[:, :-completion],
            "completion_ids": ids[:, -completion:],
            "completion_mask": mask_BC,
            "advantages": ADVANTAGES,
            "num_items_in_batch": mask_BC.sum(),
            "old_per_token_logps": logps.double() - shifts,
            "ref_per_token_logps": logps.double() + 0.3 * torch.randn(logps.shape, generator=generator),
        }
        yield trainer, inputs


def gradients(trainer, inputs):
    loss = trainer._compute_loss(trainer.model, inputs)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("loss_type", slow_but(["grpo_sequence", "grpo", "dapo", "cispo"], ["grpo_sequence", "grpo"]))
def test_the_gradient_of_a_loss(case, loss_type):
    """Guards against a chunk that is dropped, counted twice or weighted by another row's advantage, and against a term
    of the loss that loses its gradient. There are clipped and unclipped tokens: a zero gradient would prove nothing."""
    trainer, inputs = case
    trainer.loss_type = loss_type
    trainer.epsilon_high = 1.05 if loss_type == "cispo" else 0.2  # cispo clips at epsilon_high, not at 1 + epsilon_high
    for beta, entropy_coef in ((0.0, 0.0), (0.1, 0.01)):
        trainer.beta = beta
        trainer.entropy_coef = entropy_coef
        share_prompts(trainer, False)
        wanted = gradients(trainer, inputs)
        metrics = trainer._metrics["train"]
        if loss_type == "cispo":
            assert 0 < metrics["cispo_clip_ratio"][-1] < 0.5
        else:
            assert metrics["clip_ratio/low_mean"][-1] > 0
            assert metrics["clip_ratio/high_mean"][-1] > 0
            assert metrics["clip_ratio/region_mean"][-1] < 0.6
        share_prompts(trainer, True)
        for chunk_tokens in (None, 64, 330):
            trainer.args.chunk_tokens = chunk_tokens
            for name, grad in gradients(trainer, inputs).items():
                assert wanted[name].norm() > 0, name
                error = (grad - wanted[name]).norm() / wanted[name].norm()
                assert error < 1e-6, (name, error.item(), beta, entropy_coef, chunk_tokens)


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], [torch.float32]))
def test_a_base_of_four_bits(dtype, tmp_path):
    """NF4 on the embedded model: dequantised weights must not depend on the number of rows of a forward. Log-probs and
    gradients (relative) agree to 5e-5 nats and 1e-4 in float32, and to 0.1 nats and 0.05 in bfloat16 (8 bits)."""
    config = transformers.BitsAndBytesConfig(**NF4.to_dict() | {"bnb_4bit_compute_dtype": dtype})
    trainer = trainer_on(str(TINY_MODEL), tmp_path, quantization_config=config)
    projection = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert projection.weight.dtype == torch.uint8
    assert projection.compute_dtype == dtype
    ids, mask, completion = padded_batch((60, 40), ((12, 7, 9, 5), (5, 12, 0, 1)))
    results = {}
    for chunk_tokens in ("plain", None, 50, 110):  # 50 cuts the prompt, 110 holds two rows
        share_prompts(trainer, chunk_tokens != "plain")
        trainer.args.chunk_tokens = chunk_tokens
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, completion, compute_entropy=True
        )
        weights = torch.linspace(-1, 1, len(ids)).unsqueeze(1) * mask[:, -completion:]
        loss = ((logps + 0.01 * entropies) * weights).sum()
        parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(parameters.values()))
        results[chunk_tokens] = logps.detach() * mask[:, -completion:], dict(zip(parameters, grads, strict=True))
    want, wanted = results.pop("plain")
    assert want.abs().max() > 1
    for chunk_tokens, (logps, grads) in results.items():
        torch.testing.assert_close(logps, want, atol=5e-5 if dtype == torch.float32 else 0.1, rtol=0)
        for name, grad in grads.items():
            assert wanted[name].norm() > 0, name
            error = (grad - wanted[name]).norm() / wanted[name].norm()
            assert error < (1e-4 if dtype == torch.float32 else 0.05), (name, error.item(), chunk_tokens)
