"""Which answers of a large group to train on: the subset whose rewards differ most.

    rewards 0 0 1 0 0 0, size 4   ->   answers 0, 1, 2, 3: the only right one, and three wrong ones

Legend: M answers of a group.
"""

import torch
from torch import Tensor


def max_variance_subset(rewards_M: Tensor, size: int) -> list[int]:
    """The `size` answers with the largest variance of rewards, as indices in ascending order.

    Such a subset is made of the lowest and the highest rewards (PODS, arXiv:2504.13818, section 3), so there are
    `size` + 1 candidates. Of equal rewards, the answers that were drawn first are taken. Where fewer than `size` could
    be judged, all of these are, and the first of the others.

    Args:
        rewards_M: shape (M,); not finite where an answer could not be judged.
        size: 1 to M.
    """
    judged = rewards_M.isfinite().nonzero().flatten().tolist()
    if len(judged) <= size:
        others = [i for i in range(len(rewards_M)) if i not in set(judged)]
        return sorted(judged + others[: size - len(judged)])
    rewards = rewards_M.double().tolist()
    up = sorted(judged, key=lambda i: rewards[i])
    down = sorted(judged, key=lambda i: -rewards[i])

    def subset(lowest: int) -> list[int]:
        low = up[:lowest]
        return low + [i for i in down if i not in low][: size - lowest]

    candidates = [subset(lowest) for lowest in range(size + 1)]
    values = torch.tensor([[rewards[i] for i in candidate] for candidate in candidates], dtype=torch.float64)
    return sorted(candidates[int(values.var(dim=1, correction=0).argmax())])
