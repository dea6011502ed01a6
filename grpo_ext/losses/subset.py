"""Which completions of a large group to train on: the subset whose rewards differ most.

    rewards 0 0 1 0 0 0, size 4   ->   completions 0, 1, 2, 3: the only right one and three wrong ones

Legend: M completions of a group.
"""

import torch
from torch import Tensor


def max_variance_subset(rewards_M: Tensor, size: int) -> list[int]:
    """The `size` completions whose rewards have the largest variance, as indices in ascending order.

    Such a subset consists of the lowest and the highest rewards (PODS, arXiv:2504.13818, section 3), so there are
    `size` + 1 candidates. Among equal rewards, earlier completions win. If fewer than `size` completions could be
    judged, the subset is all of them, filled up with the first of the others.

    Args:
        rewards_M: shape (M,); not finite for completions that could not be judged.
        size: 1 to M.
    """
    judged = rewards_M.isfinite().nonzero().flatten().tolist()
    if len(judged) <= size:
        others = [i for i in range(len(rewards_M)) if i not in set(judged)]
        return sorted(judged + others[: size - len(judged)])
    rewards = rewards_M.double().tolist()
    ascending = sorted(judged, key=lambda i: rewards[i])
    descending = sorted(judged, key=lambda i: -rewards[i])

    def lowest_and_highest(lowest: int) -> list[int]:
        low = ascending[:lowest]
        return low + [i for i in descending if i not in low][: size - lowest]

    candidates = [lowest_and_highest(lowest) for lowest in range(size + 1)]
    values = torch.tensor([[rewards[i] for i in candidate] for candidate in candidates], dtype=torch.float64)
    return sorted(candidates[int(values.var(dim=1, correction=0).argmax())])
