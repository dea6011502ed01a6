"""TRL's trainer with siblings drawn together, and what is known of them from then on: log-probs, and how they ended."""

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from grpo_ext.engine.decode import GroupSampler
from grpo_ext.engine.install import shared_sampling, why_sampling_unsupported
from grpo_ext.mechanisms.adapted_head import AdaptedHeadTrainer
from grpo_ext.model.unwrap import base_of
from grpo_ext.rollout.dialogue import Dialogue

logger = get_logger(__name__)


class SharedSamplingTrainer(AdaptedHeadTrainer):
    """`AdaptedHeadTrainer` with these differences, where it shares prompts and TRL would call `generate`:

    - Completions are drawn by `engine/decode.py`: the tokens that transformers would draw from the same random state.
    - Where TRL would score the completions once more for their old log-probs (`num_iterations > 1`, or accumulation
      that does not fit the rollout), those of the sampler are taken, as long as they agree with TRL's pass to within
      `epsilon / 10` a sequence. Metric: `sampling/logp_gap`, the largest difference seen (nats a sequence).
    - Stop strings in `generation_kwargs` work (TRL raises), and completions that end with one do not count as cut.
    """

    eos_token_ids: list[int]
    mask_truncated_completions: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sampler = GroupSampler(self.temperature)
        self._sampled_logps: list[list[float]] | None = None
        self._sampler_agrees = False
        self._is_cut: list[bool] = []
        self._is_replayed: list[bool] = []
        self._stop_strings: list[str] = []
        self._masks_cut = self._samples_shared = False
        is_drawn_elsewhere = self.rollout_func is not None and not isinstance(self.rollout_func, Dialogue)
        if self.use_vllm or self.use_transformers_continuous_batching or is_drawn_elsewhere:
            return
        configs = self.generation_config, base_of(self.model).generation_config
        self._stop_strings = _as_list(next((c.stop_strings for c in configs if c.stop_strings), None))
        reason = why_sampling_unsupported(*configs)
        self._samples_shared = self._shares_prompts and reason is None
        if self._shares_prompts and reason is not None:
            logger.warning(f"Prompts are not shared in sampling, transformers' own loop is taken: {reason}.")
        if self._stop_strings and (self.tools or not self._samples_shared):
            raise ValueError(
                f"stop_strings={self._stop_strings} need shared sampling without tools: use share_prompt=True with "
                f"a model and settings that allow it (see the warning above, if any), or leave stop_strings out."
            )
        self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *_as_list(self.generation_config.eos_token_id)]))
        # TRL takes an ending by a stop string for a cut one: in the metrics and in the mask, both of which are mended.
        self._masks_cut = bool(self._stop_strings) and self.mask_truncated_completions
        self.mask_truncated_completions = self.mask_truncated_completions and not self._masks_cut

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self._samples_shared:
            return super()._generate_single_turn(*args, **kwargs)
        lm = base_of(self.accelerator.unwrap_model(self.model))
        # As in scoring, so that both see the same model; TRL draws without autocast.
        with self.accelerator.autocast(), shared_sampling(lm, self._sampler, self._stop_strings, self._tokenizer):
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        drawn = self._sampler.completions
        lengths = [min(len(ids), len(tokens)) for ids, tokens in zip(completion_ids, drawn.tokens, strict=True)]
        self._is_cut = drawn.is_cut
        return _cut(drawn.tokens, lengths), _cut(drawn.logps, lengths)

    def _generate(self, prompts: list[Any]) -> Any:
        rollout = super()._generate(prompts)
        _, completion_ids, mask, _, logps, *_ = rollout
        # Between turns stand tokens that nobody drew: TRL's pass has the old log-probs of such rows.
        self._keep_drawn(logps if mask is None else None, self._is_cut, [False] * len(completion_ids))
        if self._stop_strings:
            self._count_endings(completion_ids)
        return rollout

    def _keep_drawn(self, logps: list[list[float]] | None, is_cut: list[bool], is_replayed: list[bool]) -> None:
        """What is needed of a rollout when it is scored; rows that are replayed were drawn by an earlier policy."""
        self._sampled_logps = logps if self._samples_shared else None
        self._is_cut, self._is_replayed = is_cut, is_replayed

    def _count_endings(self, completion_ids: list[list[int]]) -> None:
        """Put in place of TRL's metrics those that know endings by a stop string."""
        mode = "train" if self.model.training else "eval"
        device = self.accelerator.device
        lengths = self.accelerator.gather(torch.tensor([len(ids) for ids in completion_ids], device=device)).float()
        is_cut = self.accelerator.gather(torch.tensor(self._is_cut, device=device))
        ended = lengths[~is_cut] if not is_cut.all() else lengths.new_zeros(1)
        endings = {"clipped_ratio": is_cut.float().mean(), "mean_terminated_length": ended.mean()}
        endings |= {"min_terminated_length": ended.min(), "max_terminated_length": ended.max()}
        for name, value in endings.items():
            self._metrics[mode][f"completions/{name}"][-1] = value.item()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._masks_cut:
            ended_B1 = ~torch.tensor(self._is_cut, device=self.accelerator.device).unsqueeze(1)
            output["completion_mask"] = output["completion_mask"] * ended_B1
            output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        sampled, self._sampled_logps = self._sampled_logps, None
        parent = super()._get_per_token_logps_and_entropies
        if sampled is None or torch.is_grad_enabled() or not self._scores_old_logps():
            return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        # Of the passes over a rollout, TRL's first is the one for the old log-probs.
        mask_BC = attention_mask[:, -logits_to_keep:]
        sampled_BC = torch.zeros_like(mask_BC, dtype=torch.float32)
        for row, logps in zip(sampled_BC, sampled, strict=True):
            row[: len(logps)] = row.new_tensor(logps)
        is_fresh_B1 = ~torch.tensor(self._is_replayed, device=mask_BC.device).unsqueeze(1)
        temperatures = self._temperatures

        def score(rows: slice) -> tuple[Tensor, float]:
            self._temperatures = temperatures and temperatures[rows]
            scored = parent(model, input_ids[rows], attention_mask[rows], logits_to_keep, *args, **kwargs)[0]
            self._temperatures = temperatures
            scored = scored.where(is_fresh_B1[rows], sampled_BC[rows])
            gaps = ((scored - sampled_BC[rows]) * mask_BC[rows]).sum(dim=1).abs()
            return scored, self.accelerator.gather(gaps.max()).max().item()

        fresh = [row for row, is_replayed in enumerate(self._is_replayed) if not is_replayed] or [0]
        everything, spot = slice(None), fresh[self.state.global_step % len(fresh)]
        logps_BC, gap = score(slice(spot, spot + 1) if self._sampler_agrees else everything)
        was_agreed, self._sampler_agrees = self._sampler_agrees, gap < self.epsilon_low / 10
        if was_agreed:  # one row was scored
            logps_BC = sampled_BC if self._sampler_agrees else score(everything)[0]
        self._metrics["train" if self.model.training else "eval"]["sampling/logp_gap"].append(gap)
        return logps_BC, None, None

    def _scores_old_logps(self) -> bool:
        """Whether TRL asks for old log-probs: where a rollout serves more than one optimizer step."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0


def _cut(rows: list[list[Any]], lengths: list[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
