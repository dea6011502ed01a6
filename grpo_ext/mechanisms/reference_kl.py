"""TRL's trainer with a choice of reference and of the KL to it: sampled estimates, or the exact one over the whole
vocabulary."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.losses.kl import sampled_kl
from grpo_ext.mechanisms.resampling import ResamplingTrainer
from grpo_ext.model.reference import REFERENCE, ReferenceSync, why_base_is_changed, why_unmixable
from grpo_ext.model.unwrap import base_of


class ReferenceKLTrainer(ResamplingTrainer):
    """TRL's `GRPOTrainer` with these differences:

    - `kl_estimator` other than "k3" with `loss_type="grpo"`: TRL's loss without its KL term, and ours beside it.
    - `kl_estimator="exact"`: the reference pass keeps its last hidden states, in host memory until their rows are
      scored, and the update compares whole distributions through the LM head that policy and reference share.
    - `log_kl`: the reference pass runs for the metric where `beta` is 0, too.
    - `sync_ref_model` works with an adapter: the reference is a second, frozen one on the same backbone, see
      `model/reference.py`. It lies in checkpoints, and not beside the adapter that is published.
    - Adapters with which the backbone alone is not the starting model are refused where there is a reference.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._heard: list[Tensor] | None = None  # log-probs that TRL's loss was given, where they are listened to
        beta, syncs = args.beta, args.sync_ref_model
        adapters = [*getattr(model, "peft_config", {}).values(), keywords.get("peft_config")]
        self._has_reference = beta != 0.0 or args.log_kl
        for reason in map(why_base_is_changed, filter(None, adapters)):
            if reason is not None and self._has_reference:
                raise ValueError(reason)
        if args.log_kl:
            args.beta = beta or 1.0  # TRL sets a reference up where this is not 0
        args.sync_ref_model = syncs and not (any(adapters) and self._has_reference)  # TRL raises on an adapter
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        args.beta = self.beta = beta
        if syncs and not args.sync_ref_model:
            args.sync_ref_model = True
            self._let_reference_follow()
        self._kl_is_exact = args.kl_estimator == "exact" and self._has_reference
        if self._kl_is_exact:
            self._require_shared_head()

    def _let_reference_follow(self) -> None:
        if self._is_sharded:
            raise ValueError(
                "sync_ref_model mixes adapters that are in one piece, and here parameters are sharded (FSDP, ZeRO-3). "
                "Use sync_ref_model=False, or accelerate_configs/multi_gpu.yaml."
            )
        reason = why_unmixable(self.model) if self.args.ref_model_mixup_alpha < 1.0 else None
        if reason is not None:
            raise ValueError(
                f"ref_model_mixup_alpha={self.args.ref_model_mixup_alpha} mixes what adapters add to linear layers, "
                f"and this adapter cannot be mixed: {reason}. Use ref_model_mixup_alpha=1.0, which copies it."
            )
        self.add_callback(ReferenceSync(self.model))

    def _require_shared_head(self) -> None:
        lm = base_of(self.model)
        if not self._shares_prompts:
            raise ValueError(
                "kl_estimator='exact' is computed where prompts are shared, and here they are not (the log says why, "
                "or share_prompt=False). Use kl_estimator='k3'."
            )
        if self.ref_model is not None or self._adapts_head or lm.get_output_embeddings().weight.requires_grad:
            raise ValueError(
                "kl_estimator='exact' needs one LM head for policy and reference, and here it is trained. Train an "
                "adapter that leaves it frozen (pass peft_config), or use kl_estimator='k3'."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._keeps_hidden = self._kl_is_exact
        with self._beta(self.beta or float(self._has_reference)):
            output = super()._generate_and_score_completions(inputs)
        self._keeps_hidden = False
        hidden_BCH, self._hidden_BCH = self._hidden_BCH, None
        if hidden_BCH is not None:  # of the passes over a rollout, TRL's last is the reference's
            output["ref_hidden_states"] = hidden_BCH
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._heard is not None:
            self._heard.append(scored[0])
        return scored

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; where its own KL is not the one that is asked for, ours is added or logged."""
        if not self._has_reference or (self.args.kl_estimator == "k3" and self.beta != 0.0):
            return super()._compute_loss(model, inputs)
        heard: list[Tensor] = []
        self._heard = heard
        with self._exact_kl_of(inputs), self._beta(0.0):
            loss = super()._compute_loss(model, inputs)
        self._heard = None
        kl_BC, mask_BC = self._token_kl(inputs, heard[0]), completion_loss_mask(inputs)
        kl_B = (kl_BC * mask_BC).sum(dim=1) / mask_BC.sum(dim=1).clamp(min=1.0)
        mode = "train" if self.model.training else "eval"
        totals = self.accelerator.reduce(torch.stack([(kl_BC.detach() * mask_BC).sum(), mask_BC.sum().float()]))
        self._metrics[mode]["kl"].append((totals[0] / totals[1].clamp(min=1.0)).item())
        if self.beta == 0.0:
            return loss
        return loss + self.beta * kl_B.mean() / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    @contextmanager
    def _exact_kl_of(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Let the scoring inside compute the exact KL of these rows, where it is asked for."""
        self._ref_hidden_BCH = inputs.get("ref_hidden_states")
        try:
            yield
        finally:
            self._ref_hidden_BCH = None

    def _token_kl(self, inputs: dict[str, Any], logps_BC: Tensor) -> Tensor:
        """The KL of each token of a micro-batch that was just scored, shape (B, C), with the policy's gradient."""
        if not self._kl_is_exact:
            return sampled_kl(
                self.args.kl_estimator,
                logps_BC,
                inputs["ref_per_token_logps"],
                old_logps_BC=inputs.get("old_per_token_logps"),
                mask_BC=completion_loss_mask(inputs),
                bias_corrected=self.args.use_bias_correction_kl,
            )
        kls_BC, self._kls_BC = self._kls_BC, None
        if kls_BC is None and inputs["completion_mask"].any():
            raise ValueError("kl_estimator='exact' needs a prompt of at least one token in every row.")
        return torch.zeros_like(logps_BC) if kls_BC is None else kls_BC

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            shutil.rmtree(Path(self.args.output_dir, REFERENCE), ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        there = Path(resume_from_checkpoint, REFERENCE).is_dir()
        if there and REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(REFERENCE)  # the saved one may have another rank
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    @contextmanager
    def _beta(self, beta: float) -> Iterator[None]:
        """TRL reads whether a reference pass is due, and what weighs its KL, from this attribute."""
        own, self.beta = self.beta, beta
        try:
            yield
        finally:
            self.beta = own


def completion_loss_mask(inputs: dict[str, Any]) -> Tensor:
    """1 on the tokens that the model wrote, shape (B, C)."""
    mask_BC = inputs["completion_mask"]
    return mask_BC * inputs["tool_mask"] if "tool_mask" in inputs else mask_BC
