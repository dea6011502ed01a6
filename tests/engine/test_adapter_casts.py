"""LoRA layers under autocast: inputs that PEFT does not cast give the same bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_ext.engine.autocast import without_adapter_casts
from tests.tools.models import random_lora


class Casts(TorchDispatchMode):
    """Counts copies to another dtype."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def run(model, without_casts, dtype):
    """Logits, gradients of the adapter, and the number of casts."""
    ids = torch.arange(2, 26).view(2, 12)
    with torch.autocast("cpu", dtype=dtype), Casts() as casts:
        if without_casts:
            with without_adapter_casts(model):
                logits = model(input_ids=ids).logits
        else:
            logits = model(input_ids=ids).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    return logits, torch.autograd.grad(logits.float().square().sum(), parameters), casts.count


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=["plain", "dropout", "DoRA"])
def test_same_bits(small_model, base, dtype, options):
    from peft import get_peft_model

    model = get_peft_model(small_model.to(base), random_lora(**options))
    model.eval()
    (logits, grads, casts), (same, equal_grads, fewer) = (run(model, without, dtype) for without in (False, True))
    assert torch.equal(logits, same)
    for grad, other in zip(grads, equal_grads, strict=True):
        assert torch.equal(grad, other)
    assert fewer < casts if not options else fewer == casts
    layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert all(layer.cast_input_dtype_enabled for layer in layers)
