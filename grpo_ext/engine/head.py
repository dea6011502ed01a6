"""The LM head of a causal language model, in tiles: from hidden states to log-probs, entropies and an exact KL, without
the logits of the whole vocabulary.

In: hidden states of tokens that are to be scored, in one row, and what comes next. Out: one number a token, float32.

The tiles are TRL's kernels; on a GPU they are Triton's. With an adapter on the head they are `low_rank_head.py`'s.

Legend: T tokens, H hidden size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from grpo_ext.engine.low_rank_head import LogitScale, active_low_rank, score_low_rank

VOCABULARY_TILE = 32768  # as TRL has it
DIVERGENCE_TOKENS = 512  # of a tile for the exact KL, which holds two of them in float32


@dataclass(frozen=True, kw_only=True)
class Head:
    """Scores hidden states of `lm`.

    Attributes:
        softcap: bound on the logits (`final_logit_softcapping`); None for none.
        scale: factor on the logits before that.
    """

    lm: PreTrainedModel
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, lm: PreTrainedModel, fused_forward: Callable[..., Any]) -> "Head":
        """The head that TRL's `add_fused_lm_head` gave the model: softcap and scale are what it found in the config."""
        found = inspect.getclosurevars(fused_forward).nonlocals
        return cls(lm=lm, softcap=found["final_logit_softcapping"], scale=found["logit_scale"])

    def score(
        self, hidden_TH: Tensor, targets_T: Tensor, temperature: float, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets and, where asked for, entropies in nats, of softmax(logits / temperature)."""
        lm_head = self.lm.get_output_embeddings()
        outputs = ("log_probs", "entropy") if with_entropies else ("log_probs",)
        tile = min(VOCABULARY_TILE, lm_head.weight.size(0))
        hidden_TH = hidden_TH.to(lm_head.weight.device)
        low_rank = active_low_rank(self.lm, hidden_TH)
        if low_rank is not None:
            logits = LogitScale(temperature=temperature, softcap=self.softcap, scale=self.scale)
            return score_low_rank(hidden_TH, lm_head, low_rank, targets_T, logits, with_entropies=with_entropies)
        logps_T, entropies_T, *_ = ChunkedLogProbFunction.apply(
            hidden_TH, lm_head.weight, lm_head.bias, targets_T, temperature, tile, self.softcap, self.scale, outputs
        )
        return logps_T, entropies_T

    def divergence(self, hidden_TH: Tensor, ref_hidden_TH: Tensor, temperature: float) -> Tensor:
        """KL(policy || reference) of each token's whole distribution, in nats, with the policy's gradient.

        Args:
            hidden_TH: of the policy.
            ref_hidden_TH: of the reference, which has the same, frozen head.
        """
        lm_head = self.lm.get_output_embeddings()
        head = (lm_head.weight, lm_head.bias)
        logits = (self.scale, self.softcap)
        parts = zip(hidden_TH.split(DIVERGENCE_TOKENS), ref_hidden_TH.split(DIVERGENCE_TOKENS), strict=True)
        kls = [
            ChunkedDivergenceFunction.apply(hidden, *head, reference, *head, 1.0, temperature, *logits, *logits)[0]
            for hidden, reference in parts
        ]
        return torch.cat(kls)
