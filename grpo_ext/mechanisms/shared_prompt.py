"""TRL's trainer on the group engine: every prompt is read once for all of its completions, under every loss of TRL."""

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from trl.trainer.utils import split_tensor_dict

from grpo_ext.config import GRPOExtConfig
from grpo_ext.engine.batch import (
    NO_GRAD_CHUNK_FACTOR,
    Scores,
    ScoringBatch,
    find_siblings,
    order_by_group,
    strip_padding,
)
from grpo_ext.engine.install import install_shared_scoring, why_scoring_unsupported
from grpo_ext.mechanisms.publishing import PublishingTrainer
from grpo_ext.model.load import disable_4bit_repacking
from grpo_ext.model.unwrap import base_of

logger = get_logger(__name__)


class SharedPromptTrainer(PublishingTrainer):
    """TRL's `GRPOTrainer` with these differences, where `args.share_prompt` is on and the model allows it:

    - Policy, old policy and reference score a prompt once and its completions on its forked cache (`engine/`), in
      chunks where `args.chunk_tokens` bounds them.
    - Micro-batches are cut from shuffled prompts in place of shuffled rows, so that siblings stay together.

    Results differ from TRL's by rounding only. Elsewhere everything is TRL's own, and the log says why.
    """

    args: GRPOExtConfig
    _buffered_inputs: list[dict[str, Any]] | None
    _idle_rows: frozenset[int] = frozenset()  # prompts with no other rows in a micro-batch run apart, or not at all
    _leaves_idle_out = False
    _adapts_head = False  # with an adapter that TRL's own scoring would leave out
    _left_out: list[int]  # the rows that the last pass did not run
    _temperatures: list[float] | None = None  # of the rows to be scored; None where it is the run's for all of them
    _keeps_hidden = False  # whether passes without a graph keep the last hidden states
    _hidden_BCH: Tensor | None = None  # of the last such pass
    _ref_hidden_BCH: Tensor | None = None  # of the rows to be scored, where an exact KL to it is asked for
    _kls_BC: Tensor | None = None  # of the last such pass

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        disable_4bit_repacking(self.model)  # before anything runs
        self._shares_prompts = self.args.share_prompt and self._set_up_sharing()

    @property
    def _is_sharded(self) -> bool:
        """Whether each process holds a part of every parameter only."""
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and self.args.deepspeed_plugin.zero_stage == 3)

    def _set_up_sharing(self) -> bool:
        """Teach the model to score rows that share prompts; where it cannot, say why, once."""
        reason = why_scoring_unsupported(self.model, self.args, is_multimodal=self._is_vlm, is_sharded=self._is_sharded)
        if reason is not None:
            logger.warning(f"Prompts are not shared between completions, TRL's plain path is taken: {reason}.")
            return False
        if self.args.gradient_checkpointing:
            logger.info("Gradient checkpointing is replaced by scoring in chunks, with the same result.")
        for model in (self.model, self.ref_model):
            if model is not None:
                install_shared_scoring(base_of(model))
        return True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._shares_prompts and self.model.training:
            output["prompt_group"] = torch.tensor(_prompt_groups(output), device=self.accelerator.device)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL shuffles the rows of a rollout before it cuts micro-batches; here the rows of a prompt stay together."""
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        rolled_out = self._buffered_inputs
        if rolled_out is None or rolled_out is buffered or not self._shares_prompts:
            return inputs
        rollout = {
            name: torch.cat([part[name] for part in rolled_out]) if value.ndim else value
            for name, value in rolled_out[0].items()
        }
        order = order_by_group(rollout["prompt_group"].tolist())
        rollout = {name: value[order] if value.ndim else value for name, value in rollout.items()}
        self._buffered_inputs = split_tensor_dict(rollout, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        siblings = find_siblings(input_ids, attention_mask, logits_to_keep) if self._shares_prompts else None
        self._hidden_BCH, self._kls_BC = None, None
        if siblings is None and self._adapts_head:
            raise ValueError("An adapter on the LM head needs a prompt of at least one token in every row.")
        # Experts are balanced over prompts, too: rows without a single token to score are left to TRL there.
        if siblings is None or (compute_aux_loss and not any(group.lengths[0] for group in siblings)):
            options |= {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            arguments = (model, input_ids, attention_mask, logits_to_keep, batch_size)
            return super()._get_per_token_logps_and_entropies(*arguments, **options)
        siblings = [group for group in siblings if group.lengths[0] or compute_aux_loss]
        idle = [group for group in siblings if self._idle_rows.issuperset(group.rows)]
        siblings = [group for group in siblings if group not in idle]
        self._left_out = [row for group in idle for row in group.rows] if self._leaves_idle_out else []
        chunk_tokens = self.args.chunk_tokens
        if chunk_tokens is None and self.args.gradient_checkpointing:
            one_row_at_a_time = [group.prompt_tokens + group.lengths[0] for group in siblings + idle]
            chunk_tokens = max(one_row_at_a_time, default=1)
        if chunk_tokens is not None and not torch.is_grad_enabled():
            chunk_tokens *= NO_GRAD_CHUNK_FACTOR
        text_config = base_of(self.model).config.get_text_config()
        rows = ScoringBatch(
            completion_ids_BC=input_ids[:, -logits_to_keep:],
            groups=siblings,
            temperatures=self._temperatures or [self.temperature] * len(input_ids),
            separate_groups=[] if self._leaves_idle_out else idle,
            max_rows=batch_size,
            chunk_tokens=chunk_tokens,
            experts_per_token=text_config.num_experts_per_tok if compute_aux_loss else None,
            with_entropies=compute_entropy,
            with_hidden=self._keeps_hidden,
            ref_hidden_BCH=self._ref_hidden_BCH,
        )
        with self.accelerator.autocast():
            scores: Scores = model(scoring_batch=rows)
        self._hidden_BCH, self._kls_BC = scores.hidden_BCH, scores.kls_BC
        return scores.logps_BC, scores.entropies_BC, scores.aux_loss


def _prompt_groups(output: dict[str, Any]) -> list[int]:
    """A number a row, equal for rows of the same prompt."""
    prompts = strip_padding(output["prompt_ids"], output["prompt_mask"])
    return [prompts.index(prompt) for prompt in prompts]
