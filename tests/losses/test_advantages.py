"""Advantages against hand-computed numbers."""

import math

import pytest
import torch

from grpo_ext.losses.advantages import combine_rewards, group_kind_shares, mixed_groups, population_advantages

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "expected", "is_mixed"),
    [
        # mean 0.5, population std 0.5 (the sample std would be 0.577 and give +-0.866)
        ([1, 0, 0, 1], [1, -1, -1, 1], True),
        # mean 0.25, std sqrt(3)/4: (1 - 0.25) / 0.4330127 and (0 - 0.25) / 0.4330127
        ([1, 0, 0, 0], [1.7320508, -0.5773503, -0.5773503, -0.5773503], True),
        # mean 2.5, std sqrt(1.25)
        ([1, 2, 3, 4], [-1.3416408, -0.4472136, 0.4472136, 1.3416408], True),
        # all right, all wrong: nothing to compare
        ([1, 1, 1, 1], [0, 0, 0, 0], False),
        ([0, 0, 0, 0], [0, 0, 0, 0], False),
        # equal except for rounding: dead, not +-1
        ([0.1, 0.1 + 1e-9, 0.1, 0.1], [0, 0, 0, 0], False),
        # a small but real difference counts in full: mean 0.25e-4, std 0.4330127e-4, eps 1e-8
        ([1e-4, 0, 0, 0], [1.7316509, -0.577217, -0.577217, -0.577217], True),
        # one is not judged: the other three have mean 1/3 and std sqrt(2)/3
        ([1, 0, NAN, 0], [1.4142136, -0.7071068, 0, -0.7071068], True),
        # two judged completions are enough, one or none is not
        ([1, 0, NAN, NAN], [1, -1, 0, 0], True),
        ([1, NAN, NAN, NAN], [0, 0, 0, 0], False),
        ([NAN, NAN, NAN, NAN], [0, 0, 0, 0], False),
        # an infinite reward cannot be normalised, so it counts as not judged
        ([math.inf, 1, 0, 0], [0, 1.4142136, -0.7071068, -0.7071068], True),
        ([-math.inf, 1, 1, 1], [0, 0, 0, 0], False),
    ],
)
def test_one_group_by_hand(rewards, expected, is_mixed):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    want = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(population_advantages(rewards, 4), want, atol=1e-6, rtol=0)
    assert mixed_groups(rewards.view(-1, 4)).tolist() == [is_mixed]


def test_groups_are_normalised_separately():
    """Adjacent groups with different scales must not affect each other."""
    rewards = torch.tensor([1.0, 0.0, 100.0, 300.0, 5.0, 5.0])
    want = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(population_advantages(rewards, 2), want, atol=1e-6, rtol=0)
    assert mixed_groups(rewards.view(-1, 2)).tolist() == [True, True, False]


def test_equal_float32_rewards_carry_no_advantage():
    """In float32, the mean of eight rewards of 0.1 is not exactly 0.1; divided by std + 1e-8, the rounding error would
    look like a signal of order one, and a dead group would train on noise."""
    for value in (0.1, 0.3, 1 / 3, 0.7):
        rewards = torch.full((8,), value, dtype=torch.float32)
        assert population_advantages(rewards, 8).abs().max() == 0
        assert not mixed_groups(rewards.view(-1, 8)).any()


def test_kinds_of_groups_are_distinguished():
    """Six groups: two mixed (one only in its format reward), two all right, one all wrong although its format earned
    0.2, and one without a judged completion."""
    rewards = [[1.0, 0.0], [0.2, 0.0], [1.2, 1.2], [NAN, 1.0], [0.2, 0.2], [NAN, NAN]]
    kinds = group_kind_shares(torch.tensor(rewards), max_reward=1.2)
    assert kinds == pytest.approx({"mixed": 2 / 6, "all_right": 2 / 6, "all_wrong": 1 / 6})


def test_rewards_are_weighted_and_unjudged_ones_excluded():
    rewards = torch.tensor([[1.0, 0.5], [NAN, 0.5], [0.0, NAN], [NAN, NAN]])
    total = combine_rewards(rewards, torch.tensor([1.0, 0.2]))
    torch.testing.assert_close(total, torch.tensor([1.1, 0.1, 0.0, NAN], dtype=torch.float64), equal_nan=True)
