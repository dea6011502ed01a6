"""KL estimators in training: against TRL's own, against autograd through the whole vocabulary, and a KL that is only
logged."""

import copy
from unittest.mock import patch

import pytest
import torch
from trl import GRPOTrainer

from grpo_ext.engine.scorer import Scorer
from tests.tools.lanes import slow_but
from tests.tools.models import random_lora
from tests.tools.training import adapter_of, log_of

SETTINGS = {"optim": "sgd", "learning_rate": 0.5, "temperature": 0.8, "entropy_coef": 0.0, "max_grad_norm": 1e6}
SETTINGS |= {"disable_dropout": True, "lr_scheduler_type": "constant"}


def train(build, model, **settings):
    trainer = build(copy.deepcopy(model), peft_config=random_lora(), **SETTINGS | settings)
    trainer.start = adapter_of(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings", slow_but([{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}], [{}])
)
def test_k2_trains_as_trls_corrected_k3_on_policy(build, small_model, settings):
    """On policy, the two have the same gradient at every token, so stock TRL is the oracle."""
    common = {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.3, "max_steps": 4, **settings}
    stock = train(build, small_model, trainer=GRPOTrainer, **common)
    ours = train(build, small_model, kl_estimator="k2", **common)
    without = train(build, small_model, trainer=GRPOTrainer, **common | {"beta": 0.0})
    for name, value in adapter_of(stock).items():
        torch.testing.assert_close(adapter_of(ours)[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert any(not torch.allclose(adapter_of(without)[n], v, atol=1e-3) for n, v in adapter_of(stock).items())
    assert len(log_of(ours, "kl")) == 4


@pytest.mark.parametrize("chunk_tokens", slow_but([None, 40], [40]))
@pytest.mark.parametrize("loss_type", ["grpo", "grpo_sequence"])
def test_exact_kl_trains_on_the_whole_distribution(build, small_model, loss_type, chunk_tokens):
    """With equal rewards, only the KL is left in the loss. One SGD step is its gradient, here through full logits."""
    trainer = train(
        build,
        small_model,
        loss_type=loss_type,
        kl_estimator="exact",
        chunk_tokens=chunk_tokens,
        beta=0.3,
        reward=lambda completions, **columns: [1.0] * len(completions),
        learning_rate=50.0,  # far beyond the rounding of the weights
        per_device_train_batch_size=16,
        max_steps=1,
    )
    after = adapter_of(trainer)
    model = trainer.model
    for name, parameter in model.named_parameters():
        if name in trainer.start:
            parameter.data = trainer.start[name].clone()
    (part,) = trainer._buffered_inputs
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
    mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
    C = part["completion_ids"].size(1)

    def distributions():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        return (logits[:, -C - 1 : -1] / 0.8).log_softmax(dim=-1)

    with torch.no_grad(), model.disable_adapter():
        reference = distributions()
    logps = distributions()
    kls = (logps.exp() * (logps - reference)).sum(dim=-1) * part["completion_mask"]
    tokens = part["completion_mask"].sum(dim=1)
    kl = kls.sum(dim=1).mean() if loss_type == "grpo_sequence" else (kls.sum(dim=1) / tokens).mean()
    (0.3 * kl).backward()
    assert log_of(trainer, "kl")[0] == pytest.approx((kls.sum() / tokens.sum()).item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in trainer.start:
            moved = after[name] - trainer.start[name]
            assert moved.norm() > 0
            assert (moved + 50 * parameter.grad).norm() < 1e-3 * moved.norm(), name


def test_reference_states_follow_their_rows(build, small_model):
    """Micro-batches are cut from shuffled groups; training is that on a single batch."""
    common = {"kl_estimator": "exact", "beta": 0.3, "max_steps": 3, "max_grad_norm": 0.5}
    whole = train(build, small_model, **common)
    cut = train(build, small_model, **common, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(cut)[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss_type", slow_but(["dapo", "grpo_sequence"], ["grpo_sequence"]))
def test_kl_is_logged_without_a_weight(build, small_model, loss_type):
    """At beta=0: one reference pass per rollout, the KL that a tiny beta logs, and the same adapter to the bit."""
    common = {"loss_type": loss_type, "max_steps": 3, "entropy_coef": 0.01}
    silent = train(build, small_model, beta=0.0, **common)
    passes = []
    score = Scorer.__call__

    def counted(self, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return score(self, *args, **kwargs)

    with patch.object(Scorer, "__call__", counted):
        trainer = train(build, small_model, beta=0.0, log_kl=True, **common)
    assert passes == [False, True] * 3
    assert trainer.args.beta == trainer.beta == 0.0
    assert not log_of(silent, "kl")
    for name, value in adapter_of(silent).items():
        assert torch.equal(adapter_of(trainer)[name], value), name
    weighed = train(build, small_model, beta=1e-9, use_bias_correction_kl=True, **common)
    assert log_of(trainer, "kl") == pytest.approx(log_of(weighed, "kl"), rel=1e-3)
    assert min(log_of(trainer, "kl")) > 0


def test_exact_kl_is_refused_if_the_head_is_trained(build, small_model, tmp_path):
    small_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="kl_estimator='exact' needs one LM head"):
        build(str(tmp_path / "model"), kl_estimator="exact", beta=0.1)


def test_exact_kl_is_refused_if_prompts_are_not_shared(build, small_model):
    small_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="kl_estimator='exact' needs shared prompts"):
        build(small_model, peft_config=random_lora(), kl_estimator="exact", beta=0.1)
