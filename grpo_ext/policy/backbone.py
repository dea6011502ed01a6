"""The frozen backbone stays as it was loaded, so that policy and reference are told apart by the adapter alone."""

from bitsandbytes.nn import Linear4bit
from torch import nn


def keep_four_bits(model: nn.Module) -> None:
    """Leave 4-bit weights in the format that they were quantised to.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer the first time that it runs in evaluation mode, and rounds
    its constants to bfloat16 while it does: held-out accuracy would be measured on another backbone than the one that
    training began with, training would go on on that one, and no gradient would pass through it.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
