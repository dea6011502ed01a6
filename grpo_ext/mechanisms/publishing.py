"""What is saved carries a card of ours, and what is pushed is what `report/hub.py` publishes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer
from accelerate.logging import get_logger
from torch import nn
from transformers.trainer_utils import HubStrategy
from trl import GRPOTrainer

from grpo_ext.config import GRPOExtConfig
from grpo_ext.report.card import write_card
from grpo_ext.report.hub import PublishingClient, check_write_access
from grpo_ext.report.metrics_file import metrics_path
from grpo_ext.report.png_plots import draw_curves
from grpo_ext.report.run_files import draw_or_warn

logger = get_logger(__name__)


class PublishingTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with these differences:

    - The card is that of `report/card.py`, in every folder that weights are saved to; PEFT writes its own beside them.
    - With `push_to_hub=True`, whether the token can write is found out before weights are loaded.
    - What is pushed is the adapter, tokenizer, card, curves and summary, in the background while training goes on, and
      a push that fails does not end the run. When, is transformers' `hub_strategy`:
        "every_save": at every save, and by `save_model` and `push_to_hub`;
        "end": by these two alone;
        "checkpoint", "all_checkpoints": as "every_save", and the adapter and tokenizer of a checkpoint are kept in
        `last-checkpoint` or `checkpoint-N` of the repository as well. What resumes a run stays in `output_dir`.
    """

    def __init__(self, model: str | nn.Module, reward_funcs: Any, args: GRPOExtConfig, *rest: Any, **keywords: Any):
        self._run_pushes: PublishingClient | None = None
        if args.push_to_hub and args.process_index == 0:
            check_write_access(args)
        super().__init__(model, reward_funcs, args, *rest, **keywords)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if self.is_world_process_zero():
            write_card(self, self.args.output_dir, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(self, output_dir or self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Transformers' own, which is called where `push_to_hub` is on, with a word on what is pushed."""
        strategy = self.args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            logger.warning(
                f"hub_strategy={strategy.value!r} pushes the adapter of a checkpoint, not the state of the optimizer: "
                f"a run is resumed from its output_dir."
            )
        with self._publishing():
            super().init_hf_repo(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._draw_curves()
            self.create_model_card()  # that shows them
        with self._publishing():
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self._draw_curves()
        with self._publishing():
            return super().push_to_hub(*args, **kwargs)

    def _draw_curves(self) -> None:
        if self.is_world_process_zero() and metrics_path(self.args).exists():  # else nothing is logged yet
            draw_or_warn(draw_curves, self.args.output_dir)

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Let transformers' trainer push through `PublishingClient`."""
        self._run_pushes = self._run_pushes or PublishingClient(self.args)
        client = transformers.trainer.hf_api
        transformers.trainer.hf_api = lambda: self._run_pushes
        try:
            yield
        finally:
            transformers.trainer.hf_api = client
