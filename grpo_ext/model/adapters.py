"""Adapters stay in float32, whatever the backbone is stored in.

TRL 1.16 casts the trainable weights of a quantised model to bfloat16 while it builds the trainer. A bfloat16 weight of
0.05 moves in steps of 0.0002, so an update of learning rate 1e-5 is lost to rounding, and the values of an adapter
loaded from disk change before the first step.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that an optimizer would update."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard where FSDP2 or ZeRO-3 spreads it, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def copy_adapter_values(model: nn.Module | str) -> dict[str, Tensor]:
    """A copy of the trainable values of a model that carries an adapter; nothing for a name, where none exists yet."""
    if isinstance(model, str) or not hasattr(model, "peft_config"):
        return {}
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


def restore_adapter_in_float32(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Store every trainable parameter of a PEFT model in float32, those named in `values` with exactly those values.

    Args:
        model: the model that the optimizer will see; not a PEFT model: left alone.
        values: what `copy_adapter_values` returned before something may have rounded the weights; shapes must agree.
    """
    if not hasattr(model, "peft_config"):
        return
    for name, parameter in trainable_parameters(model).items():
        parameter.data = values.get(name, parameter.data).to(parameter.device, torch.float32)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that train and parameters in all; packed 4-bit weights count as the weights they stand for."""
    if hasattr(model, "peft_config"):
        return model.get_nb_trainable_parameters()
    return model.num_parameters(only_trainable=True), model.num_parameters()
