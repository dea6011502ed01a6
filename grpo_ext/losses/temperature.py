"""How the sampling temperature moves in the course of a run: numbers in, numbers out."""

import math
from dataclasses import dataclass

TEMPERATURE_SCHEDULES = ("constant", "linear", "entropy")

# Of the controller: what a gap of one nat does to the logarithm of the temperature in one rollout, and how far from its
# start the temperature may go.
GAIN = 0.2
MAX_FACTOR = 2.0


def linear_temperature(start: float, end: float, step: int, max_steps: int) -> float:
    """From `start` in the rollout before the first optimizer step to `end` in that before the last one."""
    return start + (end - start) * min(1.0, step / max(1, max_steps - 1))


@dataclass
class EntropyController:
    """Holds the mean token entropy near a target: a warmer distribution has more of it.

    An integral controller on the logarithm of the temperature, which stays between half and twice its start.

    Attributes:
        start: the temperature that it begins with.
        target: nats a token.
        temperature: now.
    """

    start: float
    target: float
    temperature: float

    def update(self, entropy: float) -> float:
        """The temperature for the next rollout, after one whose tokens had this mean entropy in nats."""
        if math.isfinite(entropy):
            wanted = self.temperature * math.exp(GAIN * (self.target - entropy))
            self.temperature = min(max(wanted, self.start / MAX_FACTOR), self.start * MAX_FACTOR)
        return self.temperature
