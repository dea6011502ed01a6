"""TRL's trainer with a sampling temperature that moves in the course of the run."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.temperature import EntropyController, linear_temperature
from grpo_ext.mechanisms.dead_groups import DeadGroupsTrainer
from grpo_ext.mechanisms.reference_kl import completion_loss_mask

STATE_FILE = "temperature.json"


class TemperatureTrainer(DeadGroupsTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `temperature_schedule`: "linear" or "entropy" set the temperature anew before each rollout, for sampling and for
      every log-prob of its rows until the next one. Metric: `temperature`, and `entropy` is what the controller sees.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        if self._temperature_moves and not self._shares_prompts:
            raise ValueError(
                f"temperature_schedule={args.temperature_schedule!r} needs shared prompts, and here they are not "
                f"(the log says why): TRL's plain scoring knows one temperature only. Use 'constant'."
            )
        self._controller: EntropyController | None = None
        target = args.temperature_entropy_target
        if target is not None:
            self._controller = EntropyController(start=args.temperature, target=target, temperature=args.temperature)
        # Since the last rollout: the sum of token entropies and their count.
        self._entropy_seen = torch.zeros(2, device=self.accelerator.device)
        self._written: Tensor | None = None

    @property
    def _temperature_moves(self) -> bool:
        return self.args.temperature_schedule != "constant"

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._temperature_moves and self.model.training:
            self._set_temperature(self._next_temperature())
            self._metrics["train"]["temperature"].append(self.temperature)
        return super()._generate_and_score_completions(inputs)

    def _next_temperature(self) -> float:
        if self._controller is None:
            end = self.args.temperature_end
            assert end is not None  # the config requires it
            return linear_temperature(self.args.temperature, end, self.state.global_step, self.state.max_steps)
        total, tokens = self.accelerator.reduce(self._entropy_seen).tolist()
        self._entropy_seen.zero_()
        return self._controller.update(total / tokens) if tokens else self._controller.temperature

    def _set_temperature(self, temperature: float) -> None:
        """Everywhere that a temperature is kept: scoring, our sampler, transformers' and vLLM's."""
        self.temperature = self._sampler.temperature = temperature
        if self.use_vllm:
            self.vllm_generation.temperature = temperature
        else:
            self.generation_config.temperature = temperature
            self.generation_kwargs["temperature"] = temperature

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._controller is not None:
            self._written = completion_loss_mask(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
        logps_BC, entropies_BC, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._controller is not None and torch.is_grad_enabled():
            assert self._written is not None
            assert entropies_BC is not None
            sums = (entropies_BC.detach() * self._written).sum(), self._written.sum()
            self._entropy_seen += torch.stack(sums)
        return logps_BC, entropies_BC, aux_loss

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._temperature_moves and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / STATE_FILE).write_text(json.dumps({"temperature": self.temperature}) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._temperature_moves or checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if path.exists():  # else the run began with a constant temperature
            self._set_temperature(json.loads(path.read_text())["temperature"])
            if self._controller is not None:
                self._controller.temperature = self.temperature
