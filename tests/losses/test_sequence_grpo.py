"""Sequence-level GRPO against hand-computed numbers, and its gradient against a naive formula."""

import math

import pytest
import torch

from grpo_ext.losses.kl import k3, sampled_kl
from grpo_ext.losses.sequence_grpo import SequenceGRPO

PLAIN = {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "beta": 0.0, "entropy_coef": 0.0}
LOG2 = math.log(2)


def as_tensor(values):
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def compute(
    logps,
    *,
    old=None,
    ref=None,
    entropies=None,
    mask=None,
    advantages=(1.0,),
    weights=None,
    correct_kl=False,
    **constants,
):
    logps, old = as_tensor(logps), as_tensor(old)
    mask = torch.ones_like(logps) if mask is None else torch.tensor(mask)
    kl = None
    if ref is not None:
        kl = sampled_kl("k3", logps, as_tensor(ref), old_logps_BC=old, mask_BC=mask, bias_corrected=correct_kl)
    return SequenceGRPO(**PLAIN | constants)(
        logps,
        old_logps_BC=old,
        kl_BC=kl,
        entropies_BC=torch.zeros_like(logps) if entropies is None else as_tensor(entropies),
        mask_BC=mask,
        advantages_B=as_tensor(advantages),
        policy_weights_B=as_tensor(weights),
    )


@pytest.mark.parametrize(
    ("log_ratios", "advantage", "constants", "loss"),
    [
        # the ratio is the product over tokens: exp(0.05 + 0.05) = 1.105171, inside the clip range
        ([0.05, 0.05], 1.0, {}, -1.1051709),
        # ratio 2 = exp(log 2): clipped to 1.2 if the completion was good, not if it was bad
        ([LOG2 / 2, LOG2 / 2], 1.0, {}, -1.2),
        ([LOG2 / 2, LOG2 / 2], -1.0, {}, 2.0),
        # ratio 1/2: clipped to 0.8 if the completion was bad, not if it was good
        ([-LOG2, 0.0], -1.0, {}, 0.8),
        ([-LOG2, 0.0], 1.0, {}, -0.5),
        # epsilon_high is separate
        ([LOG2, 0.0], 1.0, {"epsilon_high": 0.28}, -1.28),
        # delta caps the ratio of a bad completion: 4 -> 3, and nothing else
        ([2 * LOG2, 0.0], -1.0, {"delta": 3.0}, 3.0),
        ([2 * LOG2, 0.0], 1.0, {"delta": 3.0}, -1.2),
        # a ratio beyond exp(20) stays finite
        ([30.0, 30.0], -1.0, {}, math.exp(20)),
        ([-30.0, -30.0], 1.0, {}, -math.exp(-20)),
        # dead group
        ([0.3, 0.3], 0.0, {}, 0.0),
    ],
)
def test_ratio_and_clipping_by_hand(log_ratios, advantage, constants, loss):
    result, _ = compute([log_ratios], old=[[0.0, 0.0]], advantages=[advantage], **constants)
    assert result.item() == pytest.approx(loss, rel=1e-6, abs=1e-9)


def test_kl_by_hand():
    """k3 of policy 1/2 and reference 1/4 is 1/2 - log(1/2) - 1 = 0.193147; that of equal probabilities is 0."""
    logps, ref = [[math.log(0.5), math.log(0.5)]], [[math.log(0.25), math.log(0.5)]]
    assert k3(torch.tensor(logps), torch.tensor(ref)).tolist() == [pytest.approx([0.1931472, 0.0], abs=1e-6)]
    loss, metrics = compute(logps, old=logps, ref=ref, advantages=[0.0], beta=0.1)
    assert loss.item() == pytest.approx(0.0193147, abs=1e-6)  # summed over the completion, not averaged
    assert [m.item() for m in metrics["kl"]] == pytest.approx([0.1931472, 2])
    assert [m.item() for m in metrics["kl_sequence"]] == pytest.approx([0.1931472, 1])
    # the token's ratio, policy 1/2 to old 1/4, doubles it
    loss, _ = compute(
        logps, old=[[math.log(0.25), math.log(0.5)]], ref=ref, advantages=[0.0], beta=0.1, correct_kl=True
    )
    assert loss.item() == pytest.approx(0.0386294, abs=1e-6)


def test_entropy_bonus_by_hand():
    """The row means are (2 + 4)/2 = 3 and 1, and their mean is 2. A mean over tokens would be 7/3."""
    loss, metrics = compute(
        [[0.0, 0.0], [0.0, 0.0]],
        entropies=[[2.0, 4.0], [1.0, 9.0]],
        mask=[[1, 1], [1, 0]],
        advantages=[0.0, 0.0],
        entropy_coef=0.01,
    )
    assert loss.item() == pytest.approx(-0.02)
    assert [m.item() for m in metrics["entropy"]] == [7.0, 3.0]  # logged as a mean over tokens, as in TRL


def test_masked_tokens_do_not_count():
    """Padding and the output of tools do not affect ratio, KL or entropy. An overflow there must not become NaN in
    the value or the gradient."""
    logps = torch.tensor([[0.1, -900.0]], dtype=torch.float64, requires_grad=True)
    old, ref = as_tensor([[0.0, 900.0]]), as_tensor([[0.1, 900.0]])
    mask = torch.tensor([[1, 0]])
    loss, _ = SequenceGRPO(**PLAIN | {"beta": 0.1, "entropy_coef": 0.1})(
        logps,
        old_logps_BC=old,
        kl_BC=sampled_kl("k3", logps, ref, old_logps_BC=old, mask_BC=mask, bias_corrected=True),
        entropies_BC=torch.tensor([[1.0, math.inf]], dtype=torch.float64),
        mask_BC=mask,
        advantages_B=torch.tensor([1.0], dtype=torch.float64),
    )
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1) - 0.1)
    assert logps.grad.isfinite().all()
    assert logps.grad[0, 1] == 0


def test_empty_row_keeps_its_place_in_the_mean():
    """A fully masked row (a truncated completion) has no policy term, but the other rows keep their weight."""
    loss, metrics = compute([[0.0], [0.0]], mask=[[1], [0]], advantages=[1.0, 1.0])
    assert loss.item() == -0.5
    assert [m.item() for m in metrics["ratio"]] == [1.0, 1.0]


def test_weights_scale_the_policy_term_only():
    loss, _ = compute([[0.0], [0.0]], ref=[[-LOG2], [0.0]], advantages=[1.0, 2.0], weights=[0.5, 0.0], beta=1.0)
    assert loss.item() == pytest.approx(-(0.5 + 0.0) / 2 + (0.5 + LOG2 - 1) / 2)


def test_clip_ratios_are_counted():
    logps = [[LOG2], [LOG2], [-LOG2], [-LOG2], [0.0]]
    _, metrics = compute(logps, old=[[0.0]] * 5, advantages=[1.0, -1.0, 1.0, -1.0, 1.0])
    shares = {name: (total / count).item() for name, (total, count) in metrics.items()}
    assert shares["clip_ratio/high_mean"] == shares["clip_ratio/low_mean"] == 0.2
    assert shares["clip_ratio/region_mean"] == 0.4
    assert shares["ratio"] == pytest.approx((2 + 2 + 0.5 + 0.5 + 1) / 5)


@pytest.mark.parametrize("correct_kl", [True, False])
def test_gradient_equals_that_of_a_naive_formula(correct_kl):
    """Row by row with Python's min and max; both clip sides and both signs of A are active."""
    torch.manual_seed(0)
    B, C = 12, 5
    logps = (-torch.rand(B, C, dtype=torch.float64) * 2).requires_grad_()
    old = logps.detach() + 0.25 * torch.randn(B, C, dtype=torch.float64)
    ref = logps.detach() + 0.5 * torch.randn(B, C, dtype=torch.float64)
    entropies = torch.rand(B, C, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(B, C) < 0.8).long()
    mask[:, 0] = 1
    advantages = torch.randn(B, dtype=torch.float64)
    constants = {"epsilon_low": 0.2, "epsilon_high": 0.3, "delta": 1.5, "beta": 0.1, "entropy_coef": 0.01}
    kl = sampled_kl("k3", logps, ref, old_logps_BC=old, mask_BC=mask, bias_corrected=correct_kl)
    loss, metrics = SequenceGRPO(**constants)(
        logps, old_logps_BC=old, kl_BC=kl, entropies_BC=entropies, mask_BC=mask, advantages_B=advantages
    )
    assert metrics["clip_ratio/low_mean"][0] > 0
    assert metrics["clip_ratio/high_mean"][0] > 0

    naive = 0.0
    for b in range(B):
        kept = mask[b].bool()
        new, o, f = logps[b][kept], old[b][kept], ref[b][kept]
        ratio = (new - o).sum().exp()
        clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.3))
        surrogate = min(min(ratio, torch.tensor(1.5)) * advantages[b], clipped * advantages[b])
        kl = (f - new).exp() - (f - new) - 1
        kl = kl * (new - o).exp() if correct_kl else kl
        naive = naive - (surrogate - 0.1 * kl.sum() + 0.01 * entropies[b][kept].mean()) / B
    torch.testing.assert_close(loss, naive)
    wanted = torch.autograd.grad(naive, (logps, entropies))
    for got, want in zip(torch.autograd.grad(loss, (logps, entropies)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert want.abs().max() > 0
