"""Difficulty pools: choose the training problems of each rollout by how often the policy solves them.

    pools = DifficultyPools(problems=1000, group_size=8, seed=0)
    pools.choose(groups=4)                            # [612, 17, 940, 255]: rows of the dataset
    pools.observe([rewards_PM], perfect=1.0)          # what the answers of the four groups earned
    pools.shares()                                    # {"unseen": 0.996, "unsolved": 0.001, "learning": 0.003, ...}

Each problem is in one of four pools:

    unseen      not sampled yet; these come first, in random order
    learning    sampled with a weight, the `worth` of its pass rate
    solved      a pass rate of `solved_rate` or more: set aside
    unsolved    a pass rate of 1 - `solved_rate` or less: set aside

An eighth of the groups (`REVISITED`) goes to the problems that were set aside longest ago, so that none is lost if the
policy improves or forgets.

An answer passes if its total reward is more than half of a perfect one. The pass rate of a problem is the mean of a
Beta distribution: (1 + passes) / (2 + answers). Each group of a problem halves the weight of its earlier
answers (`MEMORY`), because an earlier policy gave them.

The trainer chooses when a rollout begins, from the answers of all earlier rollouts. Nothing is decided when the data
loader fetches rows ahead, so its workers and its prefetching have no influence.

Legend: N problems, P groups of a rollout, M answers per group.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext.config import GRPOExtConfig
from grpo_ext.data.pass_rates import PassRate, read_pass_rates

SOLVED_RATE = 0.9  # pass rate. With 8 answers, one group that is all right or all wrong is just enough
REVISITED = 1 / 8  # share of the groups that go to problems that were set aside
MEMORY = 0.5  # factor on the weight of earlier answers per group of the same problem
POOLS = ("unseen", "unsolved", "learning", "solved")

Worth = Callable[[Tensor, Tensor, int], Tensor]


def solved_rate(group_size: int) -> float:
    """The pass rate from which on a problem is set aside: `SOLVED_RATE`, or what two right groups in a row reach if
    small groups never exceed that."""
    answers = (1 + MEMORY) * group_size
    return min(SOLVED_RATE, (1 + answers) / (2 + answers))


def reward_variance(a_N: Tensor, b_N: Tensor, group_size: int) -> Tensor:
    """The expected variance of a 0/1 reward, E[p(1-p)] for p ~ Beta(a, b)."""
    return a_N * b_N / ((a_N + b_N) * (a_N + b_N + 1))


def mixed_probability(a_N: Tensor, b_N: Tensor, group_size: int) -> Tensor:
    """The probability that a group of G has both right and wrong answers, E[1 - p^G - (1-p)^G] for p ~ Beta(a, b)."""

    def log_beta(x_N: Tensor, y_N: Tensor) -> Tensor:
        return torch.lgamma(x_N) + torch.lgamma(y_N) - torch.lgamma(x_N + y_N)

    whole_N, G = log_beta(a_N, b_N), group_size
    return 1.0 - (log_beta(a_N + G, b_N) - whole_N).exp() - (log_beta(a_N, b_N + G) - whole_N).exp()


def chosen_examples(
    loaded: list[dict[str, Any]], chosen: Sequence[int], dataset: Any, *, group_size: int, process: int
) -> list[dict[str, Any]]:
    """The rows of this process for the chosen problems, in place of those that the data loader fetched.

    Args:
        loaded: fetched rows of this process, whose number and columns are kept.
        chosen: problem of each group of all processes.
        dataset: the training data.
        process: index of this process.
    """
    first = process * len(loaded)
    problems = [chosen[row // group_size] for row in range(first, first + len(loaded))]
    rows = {problem: dataset[problem] for problem in dict.fromkeys(problems)}
    return [{name: rows[problem][name] for name in loaded[0]} for problem in problems]


class DifficultyPools:
    """The pools of a run. Every process makes the same calls with the same values, and chooses the same problems.

    Metrics: `pools/unseen`, `pools/unsolved`, `pools/learning`, `pools/solved`, the share of the training problems in
    each pool after a rollout.

    Args:
        problems: N, the number of rows of the training data.
        group_size: G, the answers per problem of a rollout.
        seed: determines every choice, together with the observed answers.
        shuffle: whether unseen problems are drawn in random order, rather than in that of the data.
        worth: the weight of a learning problem, from the parameters of its Beta distribution and G.
    """

    def __init__(
        self,
        *,
        problems: int,
        group_size: int,
        seed: int,
        shuffle: bool = True,
        worth: Worth = reward_variance,
    ):
        self.worth = worth
        self._group_size, self._seed = group_size, seed
        self._solved_rate = solved_rate(group_size)
        self._answers_N = torch.zeros(problems, dtype=torch.float64)
        self._passes_N = torch.zeros(problems, dtype=torch.float64)
        self._last_drawn_N = torch.full((problems,), -1)  # number of the call that drew a problem; -1 if unseen
        self._calls = 0  # of `choose` and `choose_more`
        self._awaited: list[list[int]] = []  # problems of the current rollout, call by call
        order = list(range(problems))
        if shuffle:
            random.Random(f"{seed} unseen").shuffle(order)
        self._order = order

    @classmethod
    def build(cls, args: GRPOExtConfig, dataset: Any) -> "DifficultyPools | None":
        """The pools of a run; None if `curriculum` is "off".

        Raises:
            ValueError: `start_pass_rates` cannot be read, see `read_pass_rates`.
        """
        if args.curriculum == "off":
            return None
        pools = cls(
            problems=len(dataset), group_size=args.num_generations, seed=args.seed, shuffle=args.shuffle_dataset
        )
        if args.start_pass_rates is not None:
            pools.start_from(read_pass_rates(args.start_pass_rates, dataset, answers=args.num_generations))
        return pools

    def __len__(self) -> int:
        return len(self._answers_N)

    def start_from(self, pass_rates: Sequence[PassRate | None]) -> None:
        """Start from these pass rates; a problem without one stays unseen."""
        for i, known in enumerate(pass_rates):
            if known is not None:
                self._answers_N[i], self._passes_N[i] = known.answers, known.rate * known.answers
                self._last_drawn_N[i] = 0

    def choose(self, groups: int) -> list[int]:
        """Begin a rollout: the problems of its groups, all different if there are enough."""
        self._awaited = []
        return self.choose_more(groups)

    def choose_more(self, groups: int) -> list[int]:
        """The problems of further groups in the current rollout."""
        self._calls += 1
        rng = random.Random(f"{self._seed} {self._calls}")
        chosen: list[int] = []
        while len(chosen) < groups:  # once, unless there are more groups than problems
            chosen += self._choose_different(min(groups - len(chosen), len(self)), rng)
        self._last_drawn_N[chosen] = self._calls
        self._awaited.append(chosen)
        return chosen

    def observe(self, rewards: Sequence[Tensor], *, perfect: float) -> None:
        """Count the answers of the current rollout.

        Args:
            rewards: total rewards for each call that chose problems, in order, shape (P, M); NaN if there is no such
                answer or it was not judged.
            perfect: the total reward of a perfect answer, as far as known.
        """
        awaited, self._awaited = self._awaited, []
        for chosen, rewards_PM in zip(awaited, rewards, strict=True):
            answers_P = rewards_PM.isfinite().sum(dim=1).tolist()
            passes_P = (rewards_PM > perfect / 2).sum(dim=1).tolist()
            for i, answers, passes in zip(chosen, answers_P, passes_P, strict=True):
                if answers:
                    self._answers_N[i] = MEMORY * self._answers_N[i] + answers
                    self._passes_N[i] = MEMORY * self._passes_N[i] + passes

    def pass_rates(self) -> Tensor:
        """The estimated pass rate of each problem, shape (N,)."""
        a_N, b_N = self._beta()
        return a_N / (a_N + b_N)

    def shares(self) -> dict[str, float]:
        """The share of the problems in each pool."""
        return {name: is_in_N.double().mean().item() for name, is_in_N in self._pools().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "answers": self._answers_N.clone(),
            "passes": self._passes_N.clone(),
            "last_drawn": self._last_drawn_N.clone(),
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._answers_N, self._passes_N = state["answers"].clone(), state["passes"].clone()
        self._last_drawn_N, self._calls = state["last_drawn"].clone(), state["calls"]
        self._awaited = []

    def _beta(self) -> tuple[Tensor, Tensor]:
        """The Beta distribution of each pass rate: a uniform prior, and the answers so far. Shapes (N,)."""
        return 1.0 + self._passes_N, 1.0 + self._answers_N - self._passes_N

    def _pools(self) -> dict[str, Tensor]:
        """Which problems are in each pool, shapes (N,)."""
        unseen_N, rate_N = self._last_drawn_N < 0, self.pass_rates()
        solved_N = rate_N >= self._solved_rate - 1e-9
        unsolved_N = rate_N <= 1 - self._solved_rate + 1e-9
        learning_N = ~(unseen_N | solved_N | unsolved_N)
        return dict(zip(POOLS, (unseen_N, unsolved_N & ~unseen_N, learning_N, solved_N & ~unseen_N), strict=True))

    def _choose_different(self, groups: int, rng: random.Random) -> list[int]:
        """Up to N different problems: unseen ones first, then by weight, then those set aside longest ago."""
        pools = self._pools()
        is_unseen = pools["unseen"].tolist()
        chosen = [i for i in self._order if is_unseen[i]][:groups]
        left = groups - len(chosen)
        if left == 0:
            return chosen
        learning = self._by_weight(pools["learning"].nonzero().flatten().tolist(), rng)
        last_drawn = self._last_drawn_N.tolist()
        resting = (pools["solved"] | pools["unsolved"]).nonzero().flatten().tolist()
        rng.shuffle(resting)
        resting.sort(key=lambda i: last_drawn[i])  # the longest first; ties in random order
        revisited = sum(rng.random() < REVISITED for _ in range(left))
        revisited = max(min(revisited, len(resting)), left - len(learning))
        return chosen + learning[: left - revisited] + resting[:revisited]

    def _by_weight(self, problems: list[int], rng: random.Random) -> list[int]:
        """The problems in random order: the next one is each of those left with a probability in proportion to its
        weight (Efraimidis and Spirakis, 2006: sort by u^(1/weight), with u uniform)."""
        a_N, b_N = self._beta()
        weights = self.worth(a_N, b_N, self._group_size)[problems].tolist()
        keys = {i: math.log(1.0 - rng.random()) / weight for i, weight in zip(problems, weights, strict=True)}
        return sorted(problems, key=keys.__getitem__, reverse=True)
