"""The sampling temperature of a run: the schedule that changes it, and the entropy on which the schedule depends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ext.losses.temperature import EntropyController, linear_temperature


class TemperatureControl:
    """Sets the temperature of each rollout, as `temperature_schedule` requires.

    Args:
        schedule: "constant", "linear" or "entropy".
        start: temperature of the first rollout.
        end: temperature of the last rollout, for the linear schedule.
        entropy_target: mean token entropy to keep, in nats, for the entropy schedule.
        device: device of the entropies.
        reduce: sums a tensor over all processes.

    Attributes:
        moves: whether the schedule changes the temperature.
        temperature: temperature of the current rollout.
    """

    def __init__(
        self,
        *,
        schedule: str,
        start: float,
        end: float | None = None,
        entropy_target: float | None = None,
        device: torch.device | str = "cpu",
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.schedule, self.start, self.end = schedule, start, end
        self.moves = schedule != "constant"
        self.temperature = start
        self._controller: EntropyController | None = None
        if entropy_target is not None:
            self._controller = EntropyController(start=start, target=entropy_target, temperature=start)
        self._reduce = reduce
        self._entropy_seen = torch.zeros(2, device=device)  # sum and number of token entropies since the last rollout

    def next(self, step: int, max_steps: int) -> float:
        """The temperature of the rollout for this optimizer step; called once per rollout."""
        if self._controller is not None:
            total, tokens = self._reduce(self._entropy_seen).tolist()
            self._entropy_seen.zero_()
            self.temperature = self._controller.update(total / tokens) if tokens else self._controller.temperature
        elif self.moves:
            assert self.end is not None  # the config requires it
            self.temperature = linear_temperature(self.start, self.end, step, max_steps)
        return self.temperature

    def observe(self, entropies_BC: Tensor, mask_BC: Tensor) -> None:
        """Add the token entropies of an update, in nats; `mask_BC` is 1 on tokens that count."""
        if self._controller is not None:
            sums = (entropies_BC.detach() * mask_BC).sum(), mask_BC.sum()
            self._entropy_seen += torch.stack(sums)

    def state_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "entropy_seen": self._entropy_seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.temperature = state["temperature"]
        self._entropy_seen = self._entropy_seen.new_tensor(state["entropy_seen"])
        if self._controller is not None:
            self._controller.temperature = self.temperature
