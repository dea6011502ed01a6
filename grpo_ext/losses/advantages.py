"""From raw rewards to advantages, the group normalisation of GRPO.

In: one reward per completion; the rows of a group are adjacent. Out: one advantage per row.

    rewards    1 0 0 1 | 0 0 0 0        two groups of four completions
    advantages 1 -1 -1 1 | 0 0 0 0      the second group is dead: equal rewards teach nothing

A reward that is not finite means that the completion could not be judged.

Legend: P prompts, G completions per prompt, B = P*G rows, F reward functions, M >= G completions sampled per prompt.
"""

import torch
from torch import Tensor

# Rewards that differ by less count as equal. In float32, the standard deviation of eight rewards of 0.1 is rounding
# noise, and dividing by (std + 1e-8) would turn it into advantages of order one.
REWARD_TOLERANCE = 1e-6


def combine_rewards(rewards_per_func_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum of the rewards of each row, as in TRL's `sum_then_normalize`.

    Rewards that are not finite are excluded from the sum (TRL turns the `None` of a reward function into NaN). A row
    that no function could judge is NaN.

    Args:
        rewards_per_func_BF: shape (B, F), or more than one dimension of rows; any float dtype.
        weights_F: shape (F,).

    Returns:
        Shape (B,), float64.
    """
    rewards_BF = rewards_per_func_BF.double()
    judged_BF = rewards_BF.isfinite()
    total_B = (rewards_BF.where(judged_BF, 0.0) * weights_F.double()).sum(dim=-1)
    return total_B.where(judged_BF.any(dim=-1), torch.nan)


def mixed_groups(rewards_PG: Tensor) -> Tensor:
    """Whether each group has a learning signal: at least two judged completions with different rewards.

    Args:
        rewards_PG: one group per row.

    Returns:
        Shape (P,), bool. All other groups are dead: max - min < 1e-6, or fewer than two completions could be judged.
    """
    rewards_PG = rewards_PG.double()
    judged_PG = rewards_PG.isfinite()
    spread_P = rewards_PG.where(judged_PG, -torch.inf).amax(dim=1) - rewards_PG.where(judged_PG, torch.inf).amin(dim=1)
    return (judged_PG.sum(dim=1) >= 2) & (spread_P >= REWARD_TOLERANCE)


def group_kind_shares(rewards_PG: Tensor, max_reward: float) -> dict[str, float]:
    """Shares of groups that are mixed, all right and all wrong; a group with no judged completion has no kind.

    Args:
        rewards_PG: one group per row.
        max_reward: reward of a perfect completion. A dead group is all right if its rewards are at least half of that.
    """
    is_mixed_P = mixed_groups(rewards_PG)
    common_P = rewards_PG.where(rewards_PG.isfinite(), -torch.inf).amax(dim=1)
    judged_P = common_P.isfinite()
    is_right_P = common_P >= max_reward / 2
    kinds = {
        "mixed": is_mixed_P,
        "all_right": ~is_mixed_P & judged_P & is_right_P,
        "all_wrong": ~is_mixed_P & judged_P & ~is_right_P,
    }
    return {kind: is_kind_P.double().mean().item() for kind, is_kind_P in kinds.items()}


def population_advantages(
    rewards_B: Tensor, num_generations: int, *, all_rewards_PM: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + epsilon) within each group, with the population standard deviation.

    Mean and deviation are computed in float64 over the judged completions. The advantage is 0 for a completion that
    could not be judged and for every completion of a dead group (max - min < 1e-6, or fewer than two judged).

    Args:
        rewards_B: shape (B,); the rows of a group are adjacent.
        num_generations: G; B must be a multiple of it.
        all_rewards_PM: rewards of all completions sampled per prompt, if the rows are a subset of them. Mean and
            deviation, and whether a group is dead, then depend on all of them. None if the rows are all completions.
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
