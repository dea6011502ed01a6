"""TRL's trainer with checks before the first step, and with a watch on the run."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from grpo_ext.checks.preflight import before_training, before_weights
from grpo_ext.checks.watch import Tripwires
from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.recording import RecordingTrainer

_POSITIONAL = ("model", "reward_funcs", "args")


class GuardedTrainer(RecordingTrainer):
    """TRL's `GRPOTrainer` with these differences, where `args.guards` is on:

    - Settings, data, prompts and rewards are checked before the weights are loaded, and a step of the largest shape is
      rehearsed before the first one (`checks/preflight.py`); with `args.dry_run` the run ends there.
    - The run is watched (`checks/watch.py`).
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        if args.guards:
            given = inspect.signature(GRPOTrainer).bind(model, reward_funcs, args, *rest, **keywords).arguments
            given["train_dataset"] = before_weights(given)
            rest, keywords = (), {name: value for name, value in given.items() if name not in _POSITIONAL}
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        self._is_checked = not args.guards
        self._tripwires = Tripwires(self) if args.guards else None
        if self._tripwires is not None:
            self.add_callback(self._tripwires)

    def preflight(self) -> None:
        """Check the run and rehearse its largest step, once; `train` does so where nobody did.

        Raises:
            ValueError, RuntimeError: as `before_training` in `checks/preflight.py`.
        """
        if not self._is_checked:
            before_training(self)
            self._is_checked = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.preflight()
        return TrainOutput(0, 0.0, {}) if self.args.dry_run else super().train(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._tripwires is not None and self.model.training:
            self._tripwires.after_rollout(self._metrics["train"])
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._tripwires is not None:
            self._tripwires.after_loss(loss)
        return loss
