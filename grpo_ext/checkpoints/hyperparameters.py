"""Change the learning rate and other hyperparameters of an optimizer that was loaded from a checkpoint.

    built = Hyperparameters.of(optimizer)               # as this run's settings built it
    optimizer.load_state_dict(...)                      # moments, and the hyperparameters of the earlier session
    built.put_into(optimizer, scheduler)

PyTorch saves hyperparameters with the state, so a resumed run ignores new ones. The number of steps taken, which the
schedule depends on, is kept.
"""

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of each group of an optimizer, in order."""

    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Hyperparameters":
        """Those that the optimizer has at present."""
        return cls([{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups])

    def put_into(self, optimizer: Optimizer, scheduler: Any) -> None:
        """Set them, with the learning rates of the schedule after the steps that it has counted.

        Raises:
            ValueError: the schedule depends on more than the step number, such as "reduce_lr_on_plateau".
        """
        schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"accept_changes: {type(schedule).__name__} does not compute the learning rate from the step alone, so "
                f"the optimizer of a checkpoint cannot be changed with it. Use lr_scheduler_type='constant'."
            )
        schedule.base_lrs = [group["initial_lr"] for group in self.groups]
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        for group, built, rate in zip(optimizer.param_groups, self.groups, rates, strict=True):
            group.update(built | {"lr": rate})
