"""Shares of problems and their uncertainty: 95% intervals, unbiased pass@k, and the change from before to after.

    Estimate.of([1.0, 0.0, 1.0])                     ->  0.67 [0.21, 0.94]
    Difference.of([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])  ->  +0.67 [-0.25, +1.00], p = 0.5

Before and after are measured on the same problems, so the test is paired: a change can be significant even if the two
intervals overlap. Statistics packages are imported on first use, long after the start of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
        from statsmodels.stats.proportion import proportion_confint

        total, n = sum(values), len(values)
        low, high = proportion_confint(total, n, alpha=0.05, method="wilson")
        return cls(value=total / n, low=float(low), high=float(high), n=n)

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
        from statsmodels.stats.contingency_tables import mcnemar
        from statsmodels.stats.weightstats import DescrStatsW

        changes = [b - a for a, b in zip(before, after, strict=True)]
        n = len(changes)
        low, high = DescrStatsW([*changes, 0.0, 1.0, -1.0], weights=[1.0] * (n + 1) + [0.5, 0.5]).zconfint_mean()
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        is_binary = {*before, *after} <= {0, 1}
        return cls(
            value=sum(changes) / n,
            low=max(-1.0, float(low)),
            high=min(1.0, float(high)),
            n=n,
            better=better,
            worse=worse,
            p_value=float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue) if is_binary else None,
        )

    def __str__(self) -> str:
        text = f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        if self.p_value is None:
            return text
        return f"{text}, p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.2g}'}"


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right), given `correct` right samples out of `samples` >= k.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374), equation 1.
    """
    from scipy.special import comb

    return 1.0 - float(comb(samples - correct, k) / comb(samples, k))
