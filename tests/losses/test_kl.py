"""KL estimators by hand, and their expected values and gradients: exact sums over a vocabulary of four tokens, without
sampling noise."""

import math

import pytest
import torch

from grpo_ext.losses.kl import k1, k2, k3, sampled_kl

REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
ONES = torch.ones(1, 4)


@pytest.fixture
def logits():
    return torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)


def true_kl(logits):
    logps = logits.log_softmax(0)
    return (logps.exp() * (logps - REFERENCE)).sum()


def mean_gradient(logits, estimator, *, bias_corrected, old=None):
    """Expected gradient of the estimator as a loss term, for tokens sampled from the policy or from `old`."""
    logps = logits.log_softmax(0).unsqueeze(0)
    sampled_from = (logps if old is None else old.unsqueeze(0)).detach()
    kl = sampled_kl(
        estimator, logps, REFERENCE.unsqueeze(0), old_logps_BC=sampled_from, mask_BC=ONES, bias_corrected=bias_corrected
    )
    return torch.autograd.grad((sampled_from.exp() * kl).sum(), logits)[0]


def test_values_by_hand():
    """Policy 1/2, reference 1/4: log 2 = 0.693147, log(2)^2 / 2 = 0.240227, 1/2 + log 2 - 1 = 0.193147."""
    policy, reference = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert k1(policy, reference).item() == pytest.approx(0.6931472)
    assert k2(policy, reference).item() == pytest.approx(0.2402265)
    assert k3(policy, reference).item() == pytest.approx(0.1931472)


def test_k1_and_k3_are_unbiased_and_k2_is_not(logits):
    logps = logits.log_softmax(0).detach()
    kl = true_kl(logits).item()
    assert kl > 0.1
    for estimator in (k1, k3):
        assert (logps.exp() * estimator(logps, REFERENCE)).sum().item() == pytest.approx(kl)
    assert (logps.exp() * k2(logps, REFERENCE)).sum().item() != pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_sample_means_converge_to_the_kl(logits, estimator):
    """The mean of 20,000 tokens is within 4 standard errors, which chance exceeds once in 16,000 runs (the seed is
    fixed). The standard error of k3 is smaller than that of k1."""
    logps = logits.log_softmax(0).detach()
    tokens = torch.multinomial(logps.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(5))
    values = estimator(logps[tokens], REFERENCE[tokens])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - true_kl(logits)) < 4 * error
    assert error < k1(logps[tokens], REFERENCE[tokens]).std() / math.sqrt(len(values)) * 1.001


def test_gradients_on_policy(logits):
    """The gradient of k1 is zero. k2, and k1 and k3 times the ratio, have the gradient of the KL. Plain k3 has the
    gradient of KL(reference || policy)."""
    (true,) = torch.autograd.grad(true_kl(logits), logits)
    assert true.abs().max() > 0.05
    torch.testing.assert_close(mean_gradient(logits, "k1", bias_corrected=False), torch.zeros(4, dtype=torch.float64))
    for estimator, corrected in (("k2", False), ("k2", True), ("k1", True), ("k3", True)):
        torch.testing.assert_close(mean_gradient(logits, estimator, bias_corrected=corrected), true)
    forward = logits.softmax(0).detach() - REFERENCE.exp()
    torch.testing.assert_close(mean_gradient(logits, "k3", bias_corrected=False), forward)
    assert not torch.allclose(forward, true, atol=1e-2)


def test_corrected_k3_is_k2_token_by_token(logits):
    """On policy, the two gradients are equal for every token, not only in expectation."""
    logps = logits.log_softmax(0)
    both = []
    for estimator in ("k2", "k3"):
        arguments = (estimator, logps.unsqueeze(0), REFERENCE.unsqueeze(0))
        kl = sampled_kl(*arguments, old_logps_BC=None, mask_BC=ONES, bias_corrected=True)
        both.append(torch.autograd.grad(kl[0], logps, torch.ones(4), retain_graph=True)[0])
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_off_policy(logits, estimator):
    """Tokens of an older policy: the gradient is correct with the ratio and wrong without it."""
    old = torch.tensor([0.1, 0.5, 0.1, 0.3], dtype=torch.float64).log()
    (true,) = torch.autograd.grad(true_kl(logits), logits)
    torch.testing.assert_close(mean_gradient(logits, estimator, bias_corrected=True, old=old), true)
    assert not torch.allclose(mean_gradient(logits, estimator, bias_corrected=False, old=old), true, atol=1e-2)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_masked_tokens_do_not_count(estimator):
    """No overflow reaches the value or the gradient, however large the masked log-probs are."""
    logps = torch.tensor([[-0.5, -900.0]], requires_grad=True)
    reference, old = torch.tensor([[-1.0, 900.0]]), torch.tensor([[-0.4, -2000.0]])
    kl = sampled_kl(estimator, logps, reference, old_logps_BC=old, mask_BC=torch.tensor([[1, 0]]), bias_corrected=True)
    kl.sum().backward()
    assert kl[0, 1] == 0
    assert logps.grad[0, 1] == 0
    assert logps.grad.isfinite().all()
