"""Keeps adapters in float32, whatever the precision of the backbone.

TRL 1.16 casts the trainable weights of a quantised model to bfloat16 while it builds the trainer. A bfloat16 weight of
0.05 moves in steps of 0.0002, so updates at a learning rate of 1e-5 would be lost to rounding, and an adapter loaded
from disk would change before the first step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for the parameters that require a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard under FSDP2 or ZeRO-3, else the whole tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def copy_adapter_values(model: nn.Module | str) -> dict[str, Tensor]:
    """A copy of the trainable values of a PEFT model; empty for other models, and for a model given by name."""
    if isinstance(model, str) or not hasattr(model, "peft_config"):
        return {}
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


def restore_adapter_in_float32(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Store every trainable parameter of a PEFT model in float32, and restore those in `values` exactly.

    Args:
        model: the model that the optimizer will see; unchanged if it is not a PEFT model.
        values: result of `copy_adapter_values`, from before the weights were rounded; shapes must agree.
    """
    if not hasattr(model, "peft_config"):
        return
    for name, parameter in trainable_parameters(model).items():
        parameter.data = values.get(name, parameter.data).to(parameter.device, torch.float32)


@contextmanager
def keeping_adapter(model: nn.Module) -> Iterator[None]:
    """A context at whose end every trainable parameter, and every adapter, has the values that it had at its start.

    Nothing is copied: a cast gives a parameter new values, and the old ones are put back.
    """
    adapters = tuple(f".{name}." for name in getattr(model, "peft_config", {}))
    kept = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or any(adapter in name for adapter in adapters)
    ]
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.data = values


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """The numbers of trainable and of all parameters; a packed 4-bit tensor counts as the weights that it encodes."""
    if hasattr(model, "peft_config"):
        return model.get_nb_trainable_parameters()
    return model.num_parameters(only_trainable=True), model.num_parameters()
