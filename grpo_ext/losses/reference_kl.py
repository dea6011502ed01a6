"""The KL to the reference with the estimator of the run: sampled, or exact over the whole vocabulary.

Legend: B rows, C completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ext.losses.kl import sampled_kl
from grpo_ext.losses.micro_batch import MicroBatch


@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """Computes the KL per token of a scored micro-batch.

    Attributes:
        has_reference: whether the run has a reference.
        estimator: "k1", "k2", "k3" or "exact".
        bias_corrected: TRL's `use_bias_correction_kl`; no effect on "exact".
    """

    has_reference: bool
    estimator: str
    bias_corrected: bool

    @property
    def is_exact(self) -> bool:
        """Whether scoring computes the exact KL, from the hidden states of the reference."""
        return self.has_reference and self.estimator == "exact"

    def per_token(self, micro_batch: MicroBatch, logps_BC: Tensor) -> Tensor:
        """The KL of each token, shape (B, C), with the policy's gradient.

        Args:
            micro_batch: a scored micro-batch; `inputs` has `ref_per_token_logps`.
            logps_BC: log-probs under the policy, with gradient.

        Raises:
            ValueError: the exact KL is requested, but the rows cannot share prompts.
        """
        inputs = micro_batch.inputs
        if not self.is_exact:
            return sampled_kl(
                self.estimator,
                logps_BC,
                inputs["ref_per_token_logps"],
                old_logps_BC=inputs.get("old_per_token_logps"),
                mask_BC=micro_batch.mask_BC,
                bias_corrected=self.bias_corrected,
            )
        if micro_batch.exact_kls_BC is None and inputs["completion_mask"].any():
            raise ValueError("kl_estimator='exact' needs a prompt of at least one token in every row.")
        return torch.zeros_like(logps_BC) if micro_batch.exact_kls_BC is None else micro_batch.exact_kls_BC

    @staticmethod
    def mean_over_rows(kl_BC: Tensor, mask_BC: Tensor) -> Tensor:
        """The mean over rows of each row's mean KL per token, a scalar."""
        return ((kl_BC * mask_BC).sum(dim=1) / mask_BC.sum(dim=1).clamp(min=1.0)).mean()
