"""Shares of problems and their uncertainty: 95% intervals, unbiased pass@k, and the change from before to after.

    Estimate.of([1.0, 0.0, 1.0])                     ->  0.67 [0.21, 0.94]
    Difference.of([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])  ->  +0.67 [-0.25, +1.00], p = 0.5

Before and after are measured on the same problems, so the test is paired: a change can be significant although the two
intervals overlap. scipy is slow to import, so it is imported only to compute a p-value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)  # 1.96, standard errors on each side of a 95% interval


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share of problems with its 95% interval.

    Attributes:
        value: mean over problems, in [0, 1].
        low, high: Wilson score interval over problems. If several samples per problem give shares between 0 and 1, it
            is wider than necessary, never narrower.
        n: number of problems.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The mean of per-problem values in [0, 1]."""
        n = len(values)
        value = sum(values) / n
        # Written out because scipy's Wilson interval takes only whole numbers of solved problems.
        scale = 1 + Z**2 / n
        center = (value + Z**2 / (2 * n)) / scale
        margin = Z * sqrt(value * (1 - value) / n + (Z / (2 * n)) ** 2) / scale
        return cls(value=value, low=max(0.0, center - margin), high=min(1.0, center + margin), n=n)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The change on the same problems, after minus before.

    Attributes:
        value: mean change over problems, in [-1, 1].
        low, high: 95% interval of `value`. It includes two pseudo-problems, one without a change and one with half of
            its weight on +1 and half on -1, so that the interval has a width even if all problems changed alike
            (Agresti and Min, Statistics in Medicine 24:729, 2005, for shares of 0 and 1).
        n: number of problems.
        better, worse: number of problems whose share rose, and fell.
        p_value: exact McNemar test of the hypothesis that rises and falls are equally likely; None unless all shares
            are 0 or 1.
    """

    value: float
    low: float
    high: float
    n: int
    better: int
    worse: int
    p_value: float | None

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> "Difference":
        """The change of per-problem values in [0, 1], problem by problem."""
        changes = [b - a for a, b in zip(before, after, strict=True)]
        n = len(changes)
        padded_n = n + 2  # with the pseudo-problems, whose changes sum to 0 and whose squared changes sum to 1
        center = sum(changes) / padded_n
        variance = (sum(change**2 for change in changes) + 1) / padded_n - center**2
        margin = Z * sqrt(variance / (padded_n - 1))
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        is_binary = {*before, *after} <= {0, 1}
        return cls(
            value=sum(changes) / n,
            low=max(-1.0, center - margin),
            high=min(1.0, center + margin),
            n=n,
            better=better,
            worse=worse,
            p_value=_mcnemar_p_value(better, worse) if is_binary else None,
        )

    def __str__(self) -> str:
        text = f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        if self.p_value is None:
            return text
        return f"{text}, p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.2g}'}"


def _mcnemar_p_value(better: int, worse: int) -> float:
    """Two-sided exact test that a changed problem is as likely to get better as worse; 1 if no problem changed."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right), given `correct` right samples out of `samples` >= k.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374), equation 1.
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)
