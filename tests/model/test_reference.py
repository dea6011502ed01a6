"""The reference of an adapter: exactly the starting model, an exact mix of products, and where it is saved."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from trl.trainer.utils import use_adapter

from grpo_ext import GRPOExtTrainer
from grpo_ext.model.reference import REFERENCE, update_reference
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, log_of

IDS = torch.tensor([[5, 9, 14, 3, 22, 7]])


def reference_logits(model):
    with torch.no_grad(), use_adapter(model, adapter_name=REFERENCE if REFERENCE in model.peft_config else None):
        return model(input_ids=IDS).logits


def deltas(model, adapter):
    """The product that the adapter adds to each weight."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 14
    return {name: layer.get_delta_weight(adapter).clone() for name, layer in layers.items()}


def perturb(model):
    """Change the policy."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".default." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_products_are_mixed(small_model, alpha, changes):
    """Five updates equal the mix of the adapters' products, which a mix of the factors would miss by far."""
    model = get_peft_model(small_model, random_lora(**changes))
    want = {name: torch.zeros_like(delta) for name, delta in deltas(model, "default").items()}
    for _ in range(5):
        perturb(model)
        want = {name: (1 - alpha) * want[name] + alpha * delta for name, delta in deltas(model, "default").items()}
        update_reference(model, alpha)
        for name, delta in deltas(model, REFERENCE).items():
            torch.testing.assert_close(delta, want[name], atol=1e-5, rtol=1e-5)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)


def test_rank_stays_bounded(small_model):
    """Factors below float32's precision are dropped: at alpha = 0.9, eight updates remain."""
    model = get_peft_model(small_model, random_lora())
    want = {name: torch.zeros_like(delta) for name, delta in deltas(model, "default").items()}
    for _ in range(12):
        perturb(model)
        want = {name: 0.1 * want[name] + 0.9 * delta for name, delta in deltas(model, "default").items()}
        update_reference(model, 0.9)
    for name, delta in deltas(model, REFERENCE).items():
        torch.testing.assert_close(delta, want[name], atol=1e-5, rtol=1e-5)
    assert model.peft_config[REFERENCE].r == 8 * 4


def test_a_copy_is_exact(small_model):
    model = get_peft_model(small_model, random_lora(modules_to_save=["lm_head"]))
    for _ in range(2):
        perturb(model)
        model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
        update_reference(model, 1.0)
        assert torch.equal(reference_logits(model), model(input_ids=IDS).logits)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert not any(f".{REFERENCE}." in name for name in trainable)


def test_trained_modules_are_mixed_too(small_model):
    model = get_peft_model(small_model, random_lora(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    start = head.original_module.weight.clone()
    head.modules_to_save["default"].weight.data += 1.0
    update_reference(model, 0.25)
    torch.testing.assert_close(head.modules_to_save[REFERENCE].weight, start + 0.25)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_reference_of_a_new_adapter_is_the_pristine_base(build, small_model, changes):
    pristine = copy.deepcopy(small_model)(input_ids=IDS).logits
    trainer = build(small_model, peft_config=random_lora(**changes), beta=0.1, learning_rate=0.1)
    trainer.train()
    torch.testing.assert_close(reference_logits(trainer.model), pristine, atol=1e-6, rtol=0)
    assert not torch.allclose(trainer.model(input_ids=IDS).logits, pristine, atol=1e-2)


def test_the_reference_of_a_loaded_adapter_is_a_copy_of_it(build, small_model):
    model = get_peft_model(small_model, random_lora())
    start = model(input_ids=IDS).logits.detach()
    trainer = build(model, beta=0.1, learning_rate=0.1, max_steps=3)
    trainer.train()
    torch.testing.assert_close(reference_logits(trainer.model), start, atol=1e-6, rtol=0)
    assert log_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert log_of(trainer, "kl")[2] > 1e-4


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
@pytest.mark.parametrize("reference", [{"beta": 0.1}, {"beta": 0.0, "log_kl": True}])
def test_adapters_that_change_the_base_are_refused(build, small_model, changes, reference):
    with pytest.raises(ValueError, match="changes base weights, so the KL reference would not be the base model"):
        build(small_model, peft_config=random_lora(**changes), **reference)
    build(small_model, peft_config=random_lora(**changes), beta=0.0)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_reference_follows_every_few_steps(build, small_model, alpha):
    """The reference is updated after steps 2 and 4 of 5. If it copies the policy, the KL of the next step is zero."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha, "max_steps": 5}
    trainer = build(small_model, peft_config=random_lora(), beta=0.1, learning_rate=0.05, **settings)
    trainer.train()
    kl = log_of(trainer, "kl")
    for step in (2, 4):
        if alpha == 1.0:
            assert kl[step] < 1e-6 < kl[step - 1]
        else:
            assert 1e-6 < kl[step] < 0.5 * kl[step - 1]
    assert trainer.args.sync_ref_model


def test_checkpoints_contain_the_reference_and_the_output_does_not(build, small_model, tmp_path):
    """A run resumed from a reference whose rank has grown equals the uninterrupted run."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6, "beta": 0.1}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.05}
    settings["prompts"] = PROMPTS * 2  # one epoch
    base = copy.deepcopy(small_model)
    get_peft_model(small_model, random_lora()).save_pretrained(tmp_path / "start")

    def start():
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "start", is_trainable=True)
        return build(model, **settings)

    whole = start()
    whole.train()
    whole.save_model()
    folder = Path(whole.args.output_dir)
    assert (folder / "checkpoint-2" / REFERENCE / "adapter_model.safetensors").exists()
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / REFERENCE).exists()
    again = start()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for name, delta in deltas(whole.model, REFERENCE).items():
        torch.testing.assert_close(deltas(again.model, REFERENCE)[name], delta, atol=1e-6, rtol=0)
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(again)[name], value, atol=1e-6, rtol=0)


def test_what_cannot_be_mixed_is_refused(build, small_model):
    settings = {"sync_ref_model": True, "beta": 0.1}
    with pytest.raises(ValueError, match=r"DoRA is not linear in its factors.*ref_model_mixup_alpha=1\.0"):
        build(small_model, peft_config=random_lora(use_dora=True), **settings)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_trainer_that_cannot_be_built_leaves_the_settings(build, small_model, beta):
    """For `log_kl`, TRL sees another beta while it sets up the reference. If its constructor raises, the next attempt
    with the same settings, for example in a notebook, must not train with that beta."""
    made = []

    class KeepsArguments(GRPOExtTrainer):
        def __init__(self, *args, **kwargs):
            made.append(kwargs["args"])
            super().__init__(*args, **kwargs)

    wrong = {"reward_weights": [1.0, 2.0], "beta": beta, "log_kl": True, "sync_ref_model": True}
    with pytest.raises(ValueError, match="reward weights"):
        build(small_model, trainer=KeepsArguments, peft_config=random_lora(), **wrong)
    (settings,) = made
    assert (settings.beta, settings.sync_ref_model) == (beta, True)
