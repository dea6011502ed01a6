"""Replay mixed groups of recent steps in the places of dead ones.

    buffer = GroupReplayBuffer(capacity=64, max_age=4)
    buffer.add([StoredGroup(completions=..., rewards_GF=..., all_rewards_M=..., step=7)])
    buffer.drop_old(step=9)      # 0: the group is two steps old
    buffer.take(2)               # [StoredGroup(...)]: youngest first, each of them once

Legend: G completions per prompt, B rows, C completion tokens, F reward functions, M completions sampled for a prompt.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import pad

from grpo_ext import refusals
from grpo_ext.losses.advantages import mixed_groups
from grpo_ext.rollout.collect import Draw, Record, StageContext
from grpo_ext.rollout.types import Completion, Rollout

# Nats. If the probability of a completion has changed by more than a factor of e since it was sampled, its group is too
# far from the policy to learn from.
MAX_DRIFT = 1.0


@dataclass(frozen=True, kw_only=True)
class StoredGroup:
    """A mixed group of an earlier rollout.

    Attributes:
        completions: G of them with their log-probs; of the dataset's row they keep the prompt alone.
        rewards_GF: what each reward function gave; NaN if it did not score a completion.
        all_rewards_M: total rewards of all completions that were sampled for the prompt.
        step: the optimizer step that they were sampled for.
    """

    completions: list[Completion]
    rewards_GF: list[list[float]]
    all_rewards_M: list[float]
    step: int


class GroupReplayBuffer:
    """At most `capacity` groups, none of them older than `max_age` optimizer steps; the oldest leave first.

    A group that is taken leaves the buffer: nothing is replayed twice.
    """

    def __init__(self, capacity: int, max_age: int):
        self.capacity, self.max_age = capacity, max_age
        self._groups: list[StoredGroup] = []  # youngest last

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: list[StoredGroup]) -> None:
        """Keep these groups, which are younger than all others in the buffer."""
        self._groups = (self._groups + groups)[-self.capacity :]

    def drop_old(self, step: int) -> int:
        """Drop the groups that are too old for this optimizer step; returns their number."""
        before = len(self._groups)
        self._groups = [group for group in self._groups if step - group.step <= self.max_age]
        return before - len(self._groups)

    def take(self, count: int) -> list[StoredGroup]:
        """Remove the youngest groups, at most `count`, and return them, youngest first."""
        rest = max(0, len(self._groups) - count)
        self._groups, taken = self._groups[:rest], self._groups[rest:]
        return taken[::-1]

    def state_dict(self) -> dict[str, Any]:
        """Every group as JSON values, apart from what reward functions logged."""
        return {"groups": [asdict(group) for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the groups of `state_dict()`."""
        self._groups = [
            StoredGroup(**group | {"completions": [Completion(**row) for row in group["completions"]]})
            for group in state["groups"]
        ][-self.capacity :]


class Replay:
    """The stage of `replay_fraction`: up to `max_groups` dead groups per rollout give way to groups of the buffer.

    The log-probs that a replayed completion was sampled with are those of its old policy in the ratio; its advantage is
    that of its group at that time. Metrics: `replay/hit_rate`, the share of the wanted places that were filled;
    `replay/age`, optimizer steps; `replay/dropped_old` and `replay/dropped_far`, groups older than the buffer allows or
    with a completion whose log-ratio to the policy is beyond `MAX_DRIFT`.

    Args:
        max_groups: 1 or more.
        buffer: where mixed groups are kept.
        score: log-probs of completions under the policy as it is now, with their mask, shapes (G, C); `pad_completions`
            makes its tensors.
        step: the optimizer step that the rollout is for.
        record: takes the metrics.
        process, processes: index of this process, and their number. Each scores its share of the candidates.
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
        """The stage of a run; None if its settings do not ask for it.

        Raises:
            ValueError: the run cannot have it.
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
        """Groups of the rollout, the same on every process; without log-probs a group cannot be replayed."""
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
        """Put groups of the buffer into the places of dead ones."""
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
        """The largest log-ratio of the policy and the one that sampled, over the completions of each group, in nats."""
        share = -(-len(groups) // self._processes)
        distances: list[float] = []
        for group in groups[self._process * share : (self._process + 1) * share]:
            logps_GC, mask_GC = self._score(group.completions)
            sampled_GC = torch.zeros_like(logps_GC)
            for row, completion in zip(sampled_GC, group.completions, strict=True):
                assert completion.logps is not None
                row[: len(completion.logps)] = row.new_tensor(completion.logps)
            gaps_G = ((logps_GC - sampled_GC) * mask_GC).sum(dim=1).abs()
            distances.append(gaps_G.max().item())
        return gather_object(distances)


def pad_completions(
    completions: list[Completion], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Prompts padded on the left and completions on the right: token ids and mask, shapes (B, S + C), and C."""
    prompts = [torch.tensor(row.prompt_ids, device=device) for row in completions]
    answers = [torch.tensor(row.completion_ids, device=device) for row in completions]
    masks = [[torch.ones_like(ids) for ids in rows] for rows in (prompts, answers)]
    ids_BT = [pad(prompts, pad_token_id, "left"), pad(answers, pad_token_id, "right")]
    mask_BT = [pad(masks[0], 0, "left"), pad(masks[1], 0, "right")]
    return torch.cat(ids_BT, dim=1), torch.cat(mask_BT, dim=1), ids_BT[1].size(1)


def add_old_logps(inputs: dict[str, Any], logps_BC: Tensor) -> None:
    """Add the log-probs of each row's old policy to a micro-batch with replayed rows, unless it has them already.

    The old policy of rows that this very policy sampled is this policy; of the others, the one that sampled them.

    Args:
        inputs: changed in place; `is_replayed` has shape (B,), `sampling_per_token_logps` (B, C).
        logps_BC: under the policy as it is now.
    """
    if "is_replayed" in inputs and "old_per_token_logps" not in inputs and inputs["is_replayed"].any():
        is_replayed_B1 = inputs["is_replayed"].unsqueeze(1)
        old_logps_BC = inputs["sampling_per_token_logps"].where(is_replayed_B1, logps_BC.detach())
        inputs["old_per_token_logps"] = old_logps_BC
