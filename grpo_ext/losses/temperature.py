"""Schedules of the sampling temperature over a run: numbers in, numbers out."""

import math
from dataclasses import dataclass

TEMPERATURE_SCHEDULES = ("constant", "linear", "entropy")

# Of the entropy controller: the change of log(temperature) per rollout and per nat of entropy error, and the largest
# factor between the temperature and its initial value.
GAIN = 0.2
MAX_FACTOR = 2.0


def linear_temperature(start: float, end: float, step: int, max_steps: int) -> float:
    """Interpolate from `start`, for the rollout of the first optimizer step, to `end`, for that of the last step."""
    return start + (end - start) * min(1.0, step / max(1, max_steps - 1))


@dataclass
class EntropyController:
    """Keeps the mean token entropy near a target by raising the temperature if the entropy is too low.

    An integral controller on log(temperature). The temperature stays between half and twice its initial value.

    Attributes:
        start: initial temperature.
        target: mean token entropy to keep, in nats.
        temperature: current temperature.
    """

    start: float
    target: float
    temperature: float

    def update(self, entropy: float) -> float:
        """The temperature for the next rollout, given the mean token entropy of the last one in nats."""
        if math.isfinite(entropy):
            wanted = self.temperature * math.exp(GAIN * (self.target - entropy))
            self.temperature = min(max(wanted, self.start / MAX_FACTOR), self.start * MAX_FACTOR)
        return self.temperature
