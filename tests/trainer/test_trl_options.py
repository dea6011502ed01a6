"""The options of TRL on shared prompts: two rollouts, four optimizer steps, against stock TRL from the same seed."""

import pytest
import torch
from trl import GRPOTrainer

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import slow_but, thinned
from tests.tools.reward_functions import share_of_digits
from tests.tools.training import adapter_of, assert_same_training, train_on_a_copy


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
USUAL = thinned(OPTIONS, ["sequence_level_luspo", "no_scale"])  # luspo: test_shared_prompt.py, none: test_trainer.py


@pytest.fixture(scope="module")
def without_option():
    """The adapter trained without any option, filled in by the first case."""
    return {}


@pytest.mark.parametrize("option", slow_but(USUAL, ["sequence_level", "unjudged", "sampling"]))
def test_as_stock_trl(build, small_model, without_option, option):
    """Adapter, loss and every metric that both log, except times. Every option but padding has an effect."""
    stock, start = train_on_a_copy(build, small_model, GRPOTrainer, **OPTIONS[option])
    ours, _ = train_on_a_copy(build, small_model, GRPOExtTrainer, **OPTIONS[option])
    assert_same_training(ours, stock)
    got = adapter_of(ours)
    assert any(not torch.equal(value, start[name]) for name, value in got.items())
    if not without_option:
        without_option.update(adapter_of(train_on_a_copy(build, small_model, GRPOExtTrainer)[0]))
    has_effect = any(not torch.equal(value, without_option[name]) for name, value in got.items())
    assert has_effect is (option != "padded")
