"""Run parts of a step on trial: loss and gradients of some rows, without a trace in the trainer."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext.memory.plan import ADAM_STATES
from grpo_ext.model.adapters import trainable_parameters

if TYPE_CHECKING:
    from grpo_ext.trainer import GRPOExtTrainer


def update(trainer: "GRPOExtTrainer", inputs: dict[str, Any]) -> None:
    """Compute loss and gradients of this micro-batch, in addition to the optimizer states."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    parameters = list(trainable_parameters(trainer.model).values())
    optimizer_states = [torch.zeros_like(p) for p in parameters for _ in range(ADAM_STATES)]
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, inputs)
    torch.autograd.grad(loss, parameters, allow_unused=True)  # unlike `backward`, leaves the gradients of the run alone
    del optimizer_states


def rows_of(inputs: dict[str, Any], rows: slice | list[int]) -> dict[str, Any]:
    """Some rows of a rollout or a micro-batch."""
    is_per_row = {name: isinstance(value, Tensor) and value.ndim > 0 for name, value in inputs.items()}
    return {name: value[rows] if is_per_row[name] else value for name, value in inputs.items()}


@contextmanager
def without_a_trace(trainer: "GRPOExtTrainer") -> Iterator[None]:
    """A context that restores the trainer, the states of its parts, and torch's random state."""
    states = {name: copy.deepcopy(part.state_dict()) for name, part in trainer.parts.states.items()}
    device = trainer.accelerator.device
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    was_training = trainer.model.training
    try:
        random_state = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
        with random_state, trainer.leaving_no_trace():
            yield
    finally:
        trainer.model.train(was_training)
        for name, part in trainer.parts.states.items():
            part.load_state_dict(states[name])
