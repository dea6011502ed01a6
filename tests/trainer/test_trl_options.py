"""The options of TRL on shared prompts: two rollouts, four optimizer steps, against stock TRL from the same seed."""

import copy

import pytest
import torch
from trl import GRPOTrainer

from grpo_ext import GRPOExtTrainer
from tests.conftest import adapter_of, random_lora, share_of_digits

# Where ours would begin with other defaults.
COMMON = {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.1, "temperature": 0.8, "entropy_coef": 0.01}
COMMON |= {"disable_dropout": True, "max_grad_norm": 0.5, "num_iterations": 2, "max_steps": 4}
COMMON |= {"optim": "sgd", "learning_rate": 0.5}


def long_answers(completions, **columns):
    return [float(len(text)) for text in completions]


def sometimes_unjudged(completions, **columns):
    return [None if len(text) % 3 == 0 else float(text.count("1")) for text in completions]


TWO_REWARDS = [share_of_digits, long_answers]
OPTIONS = {
    "sequence_level": {"importance_sampling_level": "sequence"},
    "sequence_level_luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "normalize_then_sum": {
        "multi_objective_aggregation": "normalize_then_sum",
        "reward": [share_of_digits, long_answers],
    },
    "weights": {"reward_weights": [1.0, 0.2], "reward": [share_of_digits, long_answers]},
    "unjudged": {"reward": [sometimes_unjudged, share_of_digits]},
    "batch_scale": {"scale_rewards": "batch"},
    "no_scale": {"scale_rewards": "none"},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01},
    "mask_truncated": {"mask_truncated_completions": True},
    "top_entropy": {"top_entropy_quantile": 0.3},
    "adaptive_entropy": {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef_delta": 0.1},
    "two_sided_clipping": {"delta": 1.05, "epsilon": 0.01},
    "clip_higher": {"epsilon": 0.01, "epsilon_high": 0.02},
    "plain_kl": {"use_bias_correction_kl": False},
    "padded": {"pad_to_multiple_of": 8},
    "sampling": {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}


def train(build, model, trainer, watch=None, **settings):
    """A trained trainer and its adapter before; `watch` is given the trainer in between."""
    trainer = build(copy.deepcopy(model), trainer=trainer, **COMMON | {"peft_config": random_lora()} | settings)
    start = adapter_of(trainer)
    if watch is not None:
        watch(trainer)
    trainer.train()
    return trainer, start


@pytest.fixture(scope="module")
def without_option():
    """The adapter without any of them, once it was trained."""
    return {}


@pytest.mark.parametrize("option", OPTIONS)
def test_as_stock_trl(build, small_model, without_option, option):
    """Adapter, loss and every metric that both log, but for times; and all but padding make a difference."""
    stock, start = train(build, small_model, GRPOTrainer, **OPTIONS[option])
    ours, _ = train(build, small_model, GRPOExtTrainer, **OPTIONS[option])
    assert_same_training(ours, stock)
    got = adapter_of(ours)
    assert any(not torch.equal(value, start[name]) for name, value in got.items())
    if not without_option:
        without_option.update(adapter_of(train(build, small_model, GRPOExtTrainer)[0]))
    has_effect = any(not torch.equal(value, without_option[name]) for name, value in got.items())
    assert has_effect is (option != "padded")


def assert_same_training(ours, stock):
    """Adapter, loss and every metric that both log, but for times; ours on shared prompts."""
    assert ours.shares_prompts
    for name, value in adapter_of(stock).items():
        torch.testing.assert_close(adapter_of(ours)[name], value, atol=1e-5, rtol=1e-4, msg=name)
    rows = zip(ours.state.log_history[:-1], stock.state.log_history[:-1], strict=True)
    for our_row, stock_row in rows:
        assert set(stock_row) <= set(our_row)
        for name, value in stock_row.items():
            if "time" not in name:
                expected = value if value is None else pytest.approx(value, rel=2e-3, abs=2e-4, nan_ok=True)
                assert our_row[name] == expected, name
