"""The KL reference of an adapter: the backbone with the adapter off, or a second, frozen adapter `ref`.

A reference that follows the policy (`sync_ref_model`) is such an adapter. Mixing applies to the product s B A that an
adapter adds to a weight, not to its factors: the mean of two A times the mean of two B would be a different matrix.
Concatenating the factors makes the mix exact. Its rank grows with each update, until the oldest factors fall below the
precision of float32:

    A_ref <- [A_ref; A]    B_ref <- [(1 - alpha) B_ref, alpha B]    B_ref A_ref <- (1 - alpha) B_ref A_ref + alpha B A
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

POLICY, REFERENCE = "default", "ref"  # PEFT's name for the trained adapter, TRL's for its reference
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")  # LoRA initialisations that change base weights


def why_base_is_changed(config: PeftConfig) -> str | None:
    """The reason why the backbone with this adapter off is not the starting model; None if it is."""
    if not isinstance(config, LoraConfig):
        return None
    if config.bias != "none":
        return (
            f'lora bias="{config.bias}" changes base weights, so the KL reference would not be the base model. '
            f'Use bias="none" or beta=0.'
        )
    if str(config.init_lora_weights).startswith(BASE_CHANGING_INITS):
        return (
            f'init_lora_weights="{config.init_lora_weights}" changes base weights, so the KL reference would not be '
            f"the base model. Use init_lora_weights=True or beta=0."
        )
    return None


def why_unmixable(model: PeftModel) -> str | None:
    """The reason why the products of this adapter cannot be mixed exactly, as text for an error; None if they can."""
    config = model.peft_config[POLICY]
    if not isinstance(config, LoraConfig):
        return f"its type is {config.peft_type}"
    if config.use_dora:
        return "DoRA is not linear in its factors"
    if config.lora_bias:
        return "it has biases (lora_bias)"
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [layer.lora_A[POLICY] for layer in layers if POLICY in layer.lora_A]
    if len(factors) < len(layers) or not all(isinstance(factor, nn.Linear) for factor in factors):
        return "it adapts more than linear layers"
    return None


def update_reference(model: PeftModel, alpha: float) -> None:
    """Move the reference towards the policy: reference = (1 - alpha) reference + alpha policy.

    Args:
        model: its adapter `default` is the policy, and its adapter `ref` the reference. If there is no `ref` yet, the
            reference is the backbone alone, and `ref` is added.
        alpha: in (0, 1].
    """
    is_new = REFERENCE not in model.peft_config
    if is_new:
        model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[POLICY]))
    if alpha == 1.0:
        for name, parameter in model.named_parameters():
            if f".{POLICY}." in name or name.endswith(f".{POLICY}"):
                model.get_parameter(name.replace(f".{POLICY}", f".{REFERENCE}")).data.copy_(parameter.data)
    else:
        _mix(model, alpha, is_new=is_new)


@torch.no_grad()
def _mix(model: PeftModel, alpha: float, *, is_new: bool) -> None:
    max_parts = math.ceil(24 / -math.log2(1 - alpha))  # older parts are below the 24 bits of float32
    parts = 1
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved = (module.modules_to_save[name].parameters() for name in (REFERENCE, POLICY))
            for reference, policy in zip(*saved, strict=True):
                reference.lerp_(policy.to(reference.dtype), alpha)
        if not isinstance(module, LoraLayer):
            continue
        A, B = _factors(module, POLICY)
        B = alpha * B
        rank = len(A)
        if not is_new:
            A_before, B_before = _factors(module, REFERENCE)
            A = torch.cat([A_before, A])[-max_parts * rank :]
            B = torch.cat([(1 - alpha) * B_before, B], dim=1)[:, -max_parts * rank :]
        parts = len(A) // rank
        module.lora_A[REFERENCE].weight = nn.Parameter(A.clone(), requires_grad=False)
        module.lora_B[REFERENCE].weight = nn.Parameter(B.contiguous(), requires_grad=False)
        module.r[REFERENCE] = len(A)
    model.peft_config[REFERENCE] = _config_with_rank(model.peft_config[POLICY], parts)


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    assert isinstance(A, nn.Linear)
    assert isinstance(B, nn.Linear)
    return A.weight.data, B.weight.data


def _config_with_rank(policy: LoraConfig, parts: int) -> LoraConfig:
    """The config of a reference with `parts` times the policy's rank, and the policy's scaling."""
    config = copy.deepcopy(policy)
    alpha_factor = math.sqrt(parts) if policy.use_rslora else parts
    config.__dict__.update(
        r=policy.r * parts,
        lora_alpha=policy.lora_alpha * alpha_factor,
        rank_pattern={name: rank * parts for name, rank in (policy.rank_pattern or {}).items()},
        alpha_pattern={name: alpha * alpha_factor for name, alpha in (policy.alpha_pattern or {}).items()},
    )
    return config


@dataclass(frozen=True, kw_only=True)
class ReferenceSetup:
    """Which reference a run needs; known before the model is loaded.

    Attributes:
        is_needed: whether the loss or the log includes the KL to a reference.
        adapter_follows: whether the reference is an adapter that follows the policy (`sync_ref_model`).
    """

    is_needed: bool
    adapter_follows: bool

    @classmethod
    def of(cls, args: Any, adapters: Sequence[PeftConfig]) -> "ReferenceSetup":
        """The setup for these settings.

        Raises:
            ValueError: the backbone without these adapters would not be the starting model.
        """
        is_needed = args.beta != 0.0 or args.log_kl
        for reason in map(why_base_is_changed, adapters):
            if is_needed and reason is not None:
                raise ValueError(reason)
        return cls(is_needed=is_needed, adapter_follows=args.sync_ref_model and is_needed and bool(adapters))

    @contextmanager
    def shown_to_trl(self, args: Any) -> Iterator[None]:
        """A context that adjusts the settings for TRL's constructor, which sets up a reference only if `beta` is not 0,
        and refuses an adapter with `sync_ref_model`."""
        beta, syncs = args.beta, args.sync_ref_model
        if args.log_kl:
            args.beta = beta or 1.0
        args.sync_ref_model = syncs and not self.adapter_follows
        try:
            yield
        finally:
            args.beta, args.sync_ref_model = beta, syncs


def scores_reference(model: nn.Module, ref_model: nn.Module | None) -> bool:
    """Whether a forward of `model` at this point would run the reference: a separate model, or the backbone with the
    adapter off or with the adapter `ref`."""
    if ref_model is not None:
        return model is ref_model
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or REFERENCE in layer.active_adapters)


class ReferenceSync(TrainerCallback):
    """Moves a reference adapter towards the policy, as TRL's `SyncRefModelCallback` does for whole models: every
    `ref_model_sync_steps` optimizer steps, by `ref_model_mixup_alpha`."""

    def __init__(self, model: PeftModel):
        self._model = model

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the reference if it is due."""
        if state.global_step % args.ref_model_sync_steps == 0:
            update_reference(self._model, args.ref_model_mixup_alpha)
