"""TRL's trainer with completions of several turns, between the model and a text environment."""

from typing import Any

import torch

from grpo_ext.engine.decode import Drawn
from grpo_ext.mechanisms.shared_sampling import SharedSamplingTrainer
from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.dialogue import Dialogue


class DialogueTrainer(SharedSamplingTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - `rollout_func=Dialogue(...)`: the model talks to text environments (`rollout/dialogue.py`), one a row, all in
      step. The first words of a group are read once; from turn to turn each row goes on from the states that it left,
      so none of its history is read twice. Metrics: `dialogue/turns`, of the model in an episode, and
      `dialogue/errors`, episodes whose environment raised.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rows: list[dict[str, Any]] = []  # of the data set, those that are played
        if not isinstance(self.rollout_func, Dialogue):
            return
        if not self._samples_shared:
            raise ValueError(
                "Dialogue goes on from states that shared sampling keeps, and here it is off (the log says why, or "
                "share_prompt=False, use_vllm, use_transformers_continuous_batching). Let prompts be shared, or use "
                "TRL's environment_factory, which does without."
            )
        if self.tools:
            raise ValueError(
                "Dialogue does not work with tools or environment_factory: each plays the turns by itself. Leave one "
                "of them out."
            )
        self._turns = TurnTokenizer(self._tokenizer, self.eos_token_ids, **self.chat_template_kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def play(self, dialogue: Dialogue) -> dict[str, list[Any]]:
        """Play the rows of this rollout: what TRL expects of a `rollout_func`, and the column of `dialogue_reward`."""
        with self._sampler.keeping_rows():
            episodes = dialogue.play(
                self._rows,
                self._turns,
                self._draw_turn,
                max_tokens=self.max_completion_length,
                eos_token_id=self._tokenizer.eos_token_id,
            )
        self._is_cut = [episode.is_cut for episode in episodes]
        counts = [[episode.turns, episode.error is not None] for episode in episodes]
        counts_B2 = self.accelerator.gather(torch.tensor(counts, dtype=torch.float, device=self.accelerator.device))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["dialogue/turns"].append(counts_B2[:, 0].mean().item())
        metrics["dialogue/errors"].append(counts_B2[:, 1].sum().item())
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": [episode.logps for episode in episodes],
            "env_mask": [episode.is_own for episode in episodes],
            "episode_reward": [episode.reward for episode in episodes],
        }

    def _draw_turn(self, histories: list[list[int]], limits: list[int]) -> Drawn:
        self._sampler.limits = limits
        try:
            tokens, logps = self._generate_single_turn(histories, None, {}, self.num_generations)
        finally:
            self._sampler.limits = None
        assert logps is not None  # sampling is shared
        return Drawn(tokens=tokens, logps=logps, is_cut=self._is_cut)
