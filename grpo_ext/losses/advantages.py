"""From raw rewards to advantages, the group normalisation of GRPO.

In: the reward of every completion, rows of a group next to each other. Out: one advantage a row.

    rewards    1 0 0 1 | 0 0 0 0        two groups of four answers
    advantages 1 -1 -1 1 | 0 0 0 0      the second group is dead: all its rewards are equal, nothing to learn

Legend: P prompts, G completions per prompt, B = P*G rows, F reward functions, M answers drawn to a prompt, G or more.
"""

import torch
from torch import Tensor

# Two rewards that differ by less than this are equal. In float32, eight equal rewards of 0.1 have a standard deviation
# of rounding noise, which a division by (std + 1e-8) would blow up to advantages of order one.
REWARD_TOLERANCE = 1e-6


def combine_rewards(rewards_per_func_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum of the rewards of each row, as TRL's `sum_then_normalize` does it.

    A reward that is not finite means "could not be judged" (a reward function returned `None`, which TRL turns into
    NaN): it is left out of the sum. A row that no function could judge is NaN.

    Args:
        rewards_per_func_BF: shape (B, F), or rows in more dimensions than one, any float dtype.
        weights_F: shape (F,).

    Returns:
        Shape (B,), float64.
    """
    rewards_BF = rewards_per_func_BF.double()
    judged_BF = rewards_BF.isfinite()
    total_B = (rewards_BF.where(judged_BF, 0.0) * weights_F.double()).sum(dim=-1)
    return total_B.where(judged_BF.any(dim=-1), torch.nan)


def mixed_groups(rewards_PG: Tensor) -> Tensor:
    """Whether each group carries a learning signal: two answers could be judged and their rewards differ.

    Args:
        rewards_PG: a group a row; not finite where an answer could not be judged.

    Returns:
        Shape (P,), bool. The others are dead: max - min < 1e-6, or fewer than two answers could be judged.
    """
    rewards_PG = rewards_PG.double()
    judged_PG = rewards_PG.isfinite()
    spread_P = rewards_PG.where(judged_PG, -torch.inf).amax(dim=1) - rewards_PG.where(judged_PG, torch.inf).amin(dim=1)
    return (judged_PG.sum(dim=1) >= 2) & (spread_P >= REWARD_TOLERANCE)


def group_kind_shares(rewards_PG: Tensor, attainable: float) -> dict[str, float]:
    """Shares of groups that are mixed, all right and all wrong; a group that nobody could judge is none of these.

    Args:
        rewards_PG: as in `mixed_groups`.
        attainable: the reward of a perfect answer. A dead group is all right where its rewards are at least half of it.
    """
    alive_P = mixed_groups(rewards_PG)
    common_P = rewards_PG.where(rewards_PG.isfinite(), -torch.inf).amax(dim=1)
    judged_P = common_P.isfinite()
    right_P = common_P >= attainable / 2
    kinds = {"mixed": alive_P, "all_right": ~alive_P & judged_P & right_P, "all_wrong": ~alive_P & judged_P & ~right_P}
    return {kind: is_kind_P.double().mean().item() for kind, is_kind_P in kinds.items()}


def population_advantages(
    rewards_B: Tensor, num_generations: int, *, all_rewards_PM: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + epsilon) inside each group, with the population standard deviation.

    Mean and deviation are taken in float64 over the answers that could be judged. The advantage is 0 for an answer
    that could not be judged (NaN or infinite reward), for every answer of a dead group (max - min < 1e-6), and for
    every answer of a group in which fewer than two could be judged.

    Args:
        rewards_B: shape (B,), the rows of a group next to each other.
        num_generations: G; B must be a multiple of it.
        all_rewards_PM: rewards of all answers that were drawn to each prompt, where the rows are a part of them
            only: mean and deviation are then those of all, and what is dead is decided by all. None: the rows are all
            there is.
        epsilon: keeps the division finite; in units of reward.

    Returns:
        Shape (B,), float32.

    Source: DeepSeekMath (arXiv:2402.03300), equation 3 with outcome supervision; std divides by the count.
    """
    rewards_PG = rewards_B.double().view(-1, num_generations)
    all_rewards_PM = rewards_PG if all_rewards_PM is None else all_rewards_PM.double()
    judged_PM = all_rewards_PM.isfinite()
    count_P1 = judged_PM.sum(dim=1, keepdim=True).clamp(min=1)
    mean_P1 = all_rewards_PM.where(judged_PM, 0.0).sum(dim=1, keepdim=True) / count_P1
    variance_P1 = (all_rewards_PM - mean_P1).where(judged_PM, 0.0).square().sum(dim=1, keepdim=True) / count_P1
    counts_PG = rewards_PG.isfinite() & mixed_groups(all_rewards_PM).unsqueeze(1)
    advantages_PG = ((rewards_PG - mean_P1) / (variance_P1.sqrt() + epsilon)).where(counts_PG, 0.0)
    return advantages_PG.view(-1).float()
