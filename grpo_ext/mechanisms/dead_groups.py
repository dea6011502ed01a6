"""TRL's trainer with a choice of what to do with dead groups, whose answers all earned the same reward."""

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.reference_kl import ReferenceKLTrainer

logger = get_logger(__name__)


class DeadGroupsTrainer(ReferenceKLTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `dead_groups="skip"`: prompts none of whose rows in a micro-batch has an advantage are left out of its forward and
      backward. Every normaliser still counts them, and the adapter is that of "keep" to the bit, for which they run
      apart from the others there. Where they carry a gradient all the same (of the KL, the entropy bonus or the
      load-balancing loss) they are kept, and the log says so.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        self._entropy_of_scored = 0.0  # nats, the mean of the rows that were scored last
        self._old_logps_BC: Tensor | None = None  # of the micro-batch in the update
        reason = self._why_dead_groups_are_kept()
        self._dead_groups_have_no_gradient = reason is None
        self._leaves_idle_out = args.dead_groups == "skip" and reason is None
        if args.dead_groups == "skip" and reason is not None:
            logger.warning(f"dead_groups='skip' keeps dead groups in this run: {reason}.")

    def _why_dead_groups_are_kept(self) -> str | None:
        if not self._shares_prompts:
            return "prompts are not shared"
        if self.beta != 0.0:
            return f"beta={self.beta}, and the KL of their answers has a gradient"
        if self.args.log_kl:
            return "log_kl asks for the KL of their answers"
        if self._entropy_bonus_enabled:
            return f"entropy_coef={self.entropy_coef}, and the entropy of their answers has a gradient"
        if self.aux_loss_enabled:
            return f"router_aux_loss_coef={self.router_aux_loss_coef}, and their tokens count in the balance of experts"
        if self.top_entropy_quantile < 1.0:
            return f"top_entropy_quantile={self.top_entropy_quantile} is taken over the tokens of all answers"
        return None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._dead_groups_have_no_gradient and self.model.training:
            advantages = inputs["advantages"]
            self._idle_rows = frozenset((advantages == 0).nonzero().flatten().tolist())
            self._old_logps_BC = inputs.get("old_per_token_logps")
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._idle_rows, self._old_logps_BC = frozenset(), None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
        logps_BC, entropies_BC, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not (self._leaves_idle_out and torch.is_grad_enabled()):
            return logps_BC, entropies_BC, aux_loss
        assert entropies_BC is not None
        # What the metrics read of these rows: a ratio of 1, and the entropy of the others.
        is_left_out_B1 = torch.zeros(len(logps_BC), 1, dtype=torch.bool, device=logps_BC.device)
        is_left_out_B1[self._left_out] = True
        scored = entropies_BC.detach()[~is_left_out_B1.squeeze(1)]
        if scored.any():
            self._entropy_of_scored = scored[scored > 0].mean().item()
        if self._old_logps_BC is not None:
            logps_BC = logps_BC + self._old_logps_BC * is_left_out_B1
        return logps_BC, entropies_BC + self._entropy_of_scored * is_left_out_B1, aux_loss
