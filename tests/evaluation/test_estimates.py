"""Intervals, pass@k and paired changes, against numbers worked out by hand. z = 1.96 throughout."""

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest

from grpo_ext.evaluation.estimates import Difference, Estimate, pass_at_k


def test_wilson_interval_by_hand():
    """39 of 100: center (0.39 + z^2/200) / (1 + z^2/100) = 0.3941, half width 0.0940."""
    estimate = Estimate.of([1.0] * 39 + [0.0] * 61)
    assert (estimate.value, estimate.n) == (0.39, 100)
    assert (estimate.low, estimate.high) == pytest.approx((0.3001, 0.4880), abs=2e-4)
    assert str(estimate) == "0.39 [0.30, 0.49]"


def test_wilson_interval_of_shares():
    """Several samples per problem: 1.5 of 3 problems. Half width z sqrt(0.25/3 + z^2/36) / (1 + z^2/3) = 0.3747."""
    estimate = Estimate.of([0.25, 0.5, 0.75])
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.1253, 0.5, 0.8747), abs=1e-4)


def test_all_right_is_not_certainty():
    """50 of 50: from 1 / (1 + z^2/50) to 1."""
    estimate = Estimate.of([1.0] * 50)
    assert (estimate.low, estimate.high) == pytest.approx((0.9287, 1.0), abs=1e-4)
    assert estimate.high <= 1


def test_pass_at_k_is_unbiased():
    """Against every possible draw of k of the n samples."""
    for n, correct, k in ((5, 2, 3), (4, 0, 2), (6, 6, 1), (6, 1, 6), (5, 4, 2)):
        draws = list(combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(correct, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_difference_by_hand():
    """20 problems: 7 rose, 1 fell. McNemar: twice the probability of at most 1 head in 8 tosses of a fair coin. The
    interval is that of Agresti and Min, with half a problem more in each of the four cells."""
    before = [0.0] * 7 + [1.0] + [0.0] * 4 + [1.0] * 8
    after = [1.0] * 7 + [0.0] + [0.0] * 4 + [1.0] * 8
    found = Difference.of(before, after)
    assert (found.n, found.better, found.worse, found.value) == (20, 7, 1, pytest.approx(6 / 20))
    assert found.p_value == pytest.approx(2 * (comb(8, 0) + comb(8, 1)) / 2**8)
    rose, fell, n = 7.5, 1.5, 22
    half = 1.96 * sqrt(((rose + fell) / n - ((rose - fell) / n) ** 2) / (n - 1))
    assert (found.low, found.high) == pytest.approx((6 / n - half, 6 / n + half), abs=1e-4)
    assert str(found) == "+0.30 [+0.03, +0.52], p = 0.07"


def test_a_difference_is_paired_and_never_certain():
    """A rise from 10% to 20% is significant if no problem fell, and is not if every solved problem is another one. The
    interval keeps a width if all problems changed alike, or none did."""
    ten, twenty = [1.0] * 10 + [0.0] * 90, [1.0] * 20 + [0.0] * 80
    alike, shuffled = Difference.of(ten, twenty), Difference.of(ten[::-1], twenty)
    assert alike.value == shuffled.value == pytest.approx(0.1)
    assert alike.p_value < 0.01 < 0.05 < shuffled.p_value
    assert alike.low > 0 > shuffled.low
    assert Difference.of([0.0] * 10, [1.0] * 10).low < 0.9
    assert Difference.of([0.0] * 10, [0.0] * 10).high > 0.05


@pytest.mark.parametrize(("better", "worse", "p_value"), [(0, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (2, 8, 2 * 56 / 1024)])
def test_mcnemar_by_hand(better, worse, p_value):
    """1 + 10 + 45 = 56 of the 1024 outcomes of 10 tosses have at most 2 heads. Unchanged problems do not count."""
    changed = [0.0] * better + [1.0] * worse
    found = Difference.of([*changed, 0.0, 1.0], [*(1.0 - share for share in changed), 0.0, 1.0])
    assert found.p_value == pytest.approx(p_value)


def test_a_difference_of_shares_has_no_p_value():
    shares = Difference.of([0.25, 0.5], [0.5, 0.5])
    assert shares.p_value is None
    assert str(shares) == "+0.12 [-0.52, +0.64]"


@pytest.mark.parametrize(("rise", "fall", "n"), [(0.4, 0.02, 20), (0.2, 0.1, 64), (0.05, 0.05, 256), (0.9, 0.0, 64)])
def test_95_of_100_intervals_hold_the_truth(rise, fall, n):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        draw = rng.random(n)
        before = np.where(draw > 1 - fall, 1.0, 0.0)
        after = np.where(draw < rise, 1.0, 0.0)
        found = Difference.of(before.tolist(), after.tolist())
        held += found.low <= rise - fall <= found.high
    assert held >= 0.92 * 300
