"""Replace dead groups with mixed groups of recent steps.

    buffer = GroupReplayBuffer(capacity=64, max_age=4)
    buffer.add([StoredGroup(completions=..., rewards_GF=..., all_rewards_M=..., step=7)])
    buffer.drop_old(step=9)      # 0: the group is two steps old
    buffer.take(2)               # [StoredGroup(...)]: youngest first, each only once

Legend: G completions per prompt, B rows, C completion tokens, F reward functions, M completions sampled per prompt.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import pad

from grpo_ext import refusals
from grpo_ext.jsonable import as_json
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.rollout.collect import Draw, Record, StageContext
from grpo_ext.rollout.types import Completion, Rollout, padded_logps

# Nats. If the probability of a completion has changed by more than a factor of e since it was sampled, its group is too
# far from the policy to learn from.
MAX_DRIFT = 1.0


@dataclass(frozen=True, kw_only=True)
class StoredGroup:
    """A mixed group of an earlier rollout.

    Attributes:
        completions: the G completions, with log-probs; only the prompt of the dataset row is kept.
        rewards_GF: rewards of each function; NaN if it did not score a completion.
        all_rewards_M: total rewards of all completions sampled for the prompt.
        step: the optimizer step for which they were sampled.
    """

    completions: list[Completion]
    rewards_GF: list[list[float]]
    all_rewards_M: list[float]
    step: int


class GroupReplayBuffer:
    """Holds at most `capacity` groups, none older than `max_age` optimizer steps; the oldest leave first.

    A group that is taken leaves the buffer, so no group is replayed twice.
    """

    def __init__(self, capacity: int, max_age: int):
        self.capacity, self.max_age = capacity, max_age
        self._groups: list[StoredGroup] = []  # youngest last

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: list[StoredGroup]) -> None:
        """Add these groups, which must be younger than all others in the buffer."""
        self._groups = (self._groups + groups)[-self.capacity :]

    def drop_old(self, step: int) -> int:
        """Drop the groups that are too old at this optimizer step, and those of a later one, which an earlier call of
        `train` has left; returns their number."""
        before = len(self._groups)
        self._groups = [group for group in self._groups if 0 <= step - group.step <= self.max_age]
        return before - len(self._groups)

    def take(self, count: int) -> list[StoredGroup]:
        """Remove and return up to `count` groups, youngest first."""
        rest = max(0, len(self._groups) - count)
        self._groups, taken = self._groups[:rest], self._groups[rest:]
        return taken[::-1]

    def state_dict(self) -> dict[str, Any]:
        """Every group as JSON values; values that reward functions logged become text if JSON cannot represent them."""
        return {"groups": as_json([asdict(group) for group in self._groups])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the groups of `state_dict()`."""
        self._groups = [
            StoredGroup(**group | {"completions": [Completion(**row) for row in group["completions"]]})
            for group in state["groups"]
        ][-self.capacity :]


class Replay:
    """The stage of `replay_fraction`: replaces up to `max_groups` dead groups per rollout with groups from the buffer.

    For a replayed completion, the ratio uses the log-probs at sampling as those of the old policy, and the advantage is
    that of its group at that time. Metrics: `replay/hit_rate`, the share of the dead groups (counting up to
    `max_groups`) that were replaced; `replay/age`, in optimizer steps; `replay/dropped_old`, groups older than the
    buffer allows; `replay/dropped_far`, groups with a completion whose log-ratio to the policy is beyond `MAX_DRIFT`.

    Args:
        max_groups: at least 1.
        buffer: holds the mixed groups.
        score: returns log-probs of completions under the current policy, and their mask, shapes (G, C);
            `pad_completions` prepares its tensors.
        step: returns the optimizer step of the rollout.
        record: records the metrics.
        process, processes: index of this process, and the number of processes. Each scores its share of candidates.
    """

    def __init__(
        self,
        *,
        max_groups: int,
        buffer: GroupReplayBuffer,
        score: Callable[[list[Completion]], tuple[Tensor, Tensor]],
        step: Callable[[], int],
        record: Record,
        process: int = 0,
        processes: int = 1,
    ):
        self.max_groups, self.buffer = max_groups, buffer
        self._score, self._step, self._record = score, step, record
        self._process, self._processes = process, processes

    @classmethod
    def build(cls, context: StageContext) -> "Replay | None":
        """The stage of a run; None if its settings do not enable it.

        Raises:
            ValueError: the stage is not possible in this run.
        """
        args = context.args
        if args.replay_fraction == 0:
            return None
        refusals.refuse_interleaved(f"replay_fraction={args.replay_fraction}", context.interleaved)
        refusals.refuse_replay_without_logps(args, samples_shared=context.sampler.is_shared)
        groups = args.generation_batch_size // args.num_generations
        return cls(
            max_groups=refusals.replayed_groups(args),
            buffer=GroupReplayBuffer(capacity=groups * args.replay_max_age, max_age=args.replay_max_age),
            score=context.score,
            step=context.step,
            record=context.record,
            process=context.process,
            processes=context.processes,
        )

    def __call__(self, examples: list[dict[str, Any]], draw: Draw) -> Rollout:
        rollout = draw(examples)
        is_mixed_P = mixed_groups(rollout.all_rewards_PM)
        mixed = self._stored(rollout, is_mixed_P.nonzero().flatten().tolist())
        self._fill(rollout, (~is_mixed_P).nonzero().flatten().tolist())
        self.buffer.add(mixed)
        return rollout

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)

    def _stored(self, rollout: Rollout, groups: list[int]) -> list[StoredGroup]:
        """These groups of the rollout, the same on every process; groups without log-probs cannot be replayed."""
        own = [replace(row, example={"prompt": row.example["prompt"]}) for row in rollout.completions]
        completions = gather_object(own)
        G, rewards_BF, all_rewards_PM = rollout.group_size, rollout.rewards_BF.tolist(), rollout.all_rewards_PM.tolist()
        stored = [
            StoredGroup(
                completions=completions[group * G : (group + 1) * G],
                rewards_GF=rewards_BF[group * G : (group + 1) * G],
                all_rewards_M=all_rewards_PM[group],
                step=self._step(),
            )
            for group in groups
        ]
        return [group for group in stored if all(row.logps is not None for row in group.completions)]

    def _fill(self, rollout: Rollout, dead: list[int]) -> None:
        """Replace dead groups with groups from the buffer."""
        step = self._step()
        self._record("replay/dropped_old", float(self.buffer.drop_old(step)))
        wanted = dead[: self.max_groups]
        found: list[StoredGroup] = []
        far = 0
        while len(found) < len(wanted) and len(self.buffer):
            candidates = self.buffer.take(len(wanted) - len(found))
            is_close = [distance <= MAX_DRIFT for distance in self._distances(candidates)]
            far += is_close.count(False)
            found += [group for group, close in zip(candidates, is_close, strict=True) if close]
        self._record("replay/dropped_far", float(far))
        for place, group in zip(wanted, found, strict=False):
            rewards_GF = rollout.rewards_BF.new_tensor(group.rewards_GF)
            all_rewards_M = rollout.all_rewards_PM.new_tensor(group.all_rewards_M)
            rollout.replace_group(place, group.completions, rewards_GF, all_rewards_M)
            rollout.replayed.add(place)
            self._record("replay/age", float(step - group.step))
        if wanted:
            self._record("replay/hit_rate", len(found) / len(wanted))

    @torch.no_grad()
    def _distances(self, groups: list[StoredGroup]) -> list[float]:
        """For each group, the largest log-ratio of the current to the sampling policy over its completions, in nats."""
        share = -(-len(groups) // self._processes)
        distances: list[float] = []
        for group in groups[self._process * share : (self._process + 1) * share]:
            logps_GC, mask_GC = self._score(group.completions)
            logps = [row.logps for row in group.completions if row.logps is not None]
            sampled_GC = padded_logps(logps, like=logps_GC)  # raises if a row has none
            gaps_G = ((logps_GC - sampled_GC) * mask_GC).sum(dim=1).abs()
            distances.append(gaps_G.max().item())
        return gather_object(distances)


def pad_completions(
    completions: list[Completion], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Pad prompts on the left and completions on the right: token ids and mask, shapes (B, S + C), and C."""
    prompts = [torch.tensor(row.prompt_ids, device=device) for row in completions]
    answers = [torch.tensor(row.completion_ids, device=device) for row in completions]
    masks = [[torch.ones_like(ids) for ids in rows] for rows in (prompts, answers)]
    ids_BT = [pad(prompts, pad_token_id, "left"), pad(answers, pad_token_id, "right")]
    mask_BT = [pad(masks[0], 0, "left"), pad(masks[1], 0, "right")]
    return torch.cat(ids_BT, dim=1), torch.cat(mask_BT, dim=1), ids_BT[1].size(1)


def add_old_logps(inputs: dict[str, Any], logps_BC: Tensor) -> None:
    """Add the log-probs of each row's old policy to a micro-batch with replayed rows, unless it has them already.

    The old policy of a replayed row is the policy that sampled it; that of any other row is the current policy.

    Args:
        inputs: changed in place; `is_replayed` has shape (B,), `sampling_per_token_logps` (B, C).
        logps_BC: log-probs under the current policy.
    """
    if "is_replayed" in inputs and "old_per_token_logps" not in inputs:
        is_replayed_B1 = inputs["is_replayed"].unsqueeze(1)
        old_logps_BC = inputs["sampling_per_token_logps"].where(is_replayed_B1, logps_BC.detach())
        inputs["old_per_token_logps"] = old_logps_BC
