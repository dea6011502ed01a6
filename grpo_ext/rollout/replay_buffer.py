"""Groups kept for reuse (the document's `GRPOMemoryBuffer`): whole ones, with the log-probs that they were drawn with.

    buffer = GroupReplayBuffer(capacity=64, max_age=4)
    buffer.add([KeptGroup(answers, rewards_GF, drawn_M, step=7)])
    buffer.drop_old(step=9)      # 0: two steps old
    buffer.take(2)               # [KeptGroup(...)]: the youngest first, and each of them once

It knows neither a model nor a process; its file is JSON.

Legend: G completions per prompt, F reward functions, M answers drawn to a prompt, G or more.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_ext.rollout.types import Answer


@dataclass(frozen=True, kw_only=True)
class KeptGroup:
    """A group that was trained on.

    Attributes:
        answers: G of them, each with its log-probs; of the data set's row they hold the prompt alone.
        rewards_GF: what each reward function gave each of them; NaN where it did not judge.
        drawn_M: total rewards of all answers that were drawn to the prompt.
        step: the optimizer step that they were drawn for.
    """

    answers: list[Answer]
    rewards_GF: list[list[float]]
    drawn_M: list[float]
    step: int


class GroupReplayBuffer:
    """At most `capacity` groups, none of them older than `max_age` optimizer steps; the oldest leave first.

    A group that is taken is gone: nothing is replayed twice.
    """

    def __init__(self, capacity: int, max_age: int):
        self.capacity, self.max_age = capacity, max_age
        self._groups: list[KeptGroup] = []  # the youngest last

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: list[KeptGroup]) -> None:
        """Keep these, younger than all that are there."""
        self._groups = (self._groups + groups)[-self.capacity :]

    def drop_old(self, step: int) -> int:
        """Drop what is too old for this optimizer step; how many that were."""
        before = len(self._groups)
        self._groups = [group for group in self._groups if step - group.step <= self.max_age]
        return before - len(self._groups)

    def take(self, count: int) -> list[KeptGroup]:
        """Take the youngest out, at most `count`."""
        rest = max(0, len(self._groups) - count)
        self._groups, taken = self._groups[:rest], self._groups[rest:]
        return taken[::-1]

    def save(self, path: Path) -> None:
        """Write every group; what reward functions logged beside becomes text where JSON has no form for it."""
        path.write_text(json.dumps([asdict(group) for group in self._groups], default=str))

    def load(self, path: Path) -> None:
        """Take over the groups of a file that `save` wrote."""
        self._groups = [
            KeptGroup(**group | {"answers": [Answer(**answer) for answer in group["answers"]]})
            for group in json.loads(path.read_text())
        ][-self.capacity :]
