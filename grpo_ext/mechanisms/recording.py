"""TRL's trainer that keeps what its policy wrote, for the report of the run."""

from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from grpo_ext.config import GRPOExtConfig
from grpo_ext.mechanisms.resume import ResumeTrainer
from grpo_ext.report.completions_file import CompletionInfo, CompletionsFile, append_completions
from grpo_ext.report.display_text import gold_answer
from grpo_ext.report.run_settings import SettingsFile


class RecordingTrainer(ResumeTrainer):
    """TRL's `GRPOTrainer` with this difference:

    - The completions of every rollout, with rewards, advantages and gold answers, go to `completions.jsonl`, and the
      settings of the run to `run.json`, see `report/`.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._judged: list[CompletionInfo] = []  # the rows of this process that rewards saw last
        self._extra_columns: list[str] = []  # that they logged beside
        super().__init__(model, reward_funcs, args, *rest, **keywords)
        self.add_callback(CompletionsFile())
        self.add_callback(SettingsFile())

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        endings = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self._judged = [
            CompletionInfo(
                tokens=len(ids),
                is_cut=self._is_cut[i] if self._samples_shared and not self.tools else ids[-1] not in endings,
                gold=gold_answer(inputs[i]),
            )
            for i, ids in enumerate(completion_ids_list)
        ]
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._extra_columns = list(self._pending_extra_logs)
        return rewards_BF

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        judged, self._judged = self._judged, []
        if judged and self.model.training:
            judged = gather_object(judged)
            if self.accelerator.is_main_process:
                append_completions(self.args, self.state.global_step + 1, self._logs, judged, self._extra_columns)
        return inputs
