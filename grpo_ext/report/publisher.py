"""Push a run to the Hub. `hub.py` selects the files, and a failed push does not end the run.

transformers' `hub_strategy` decides when:
    "every_save": at every save, and by `save_model` and `push_to_hub`;
    "end": only by `save_model` and `push_to_hub`;
    "checkpoint", "all_checkpoints": as "every_save", and the adapter and tokenizer of a checkpoint are also kept in the
    folder `last-checkpoint` or `checkpoint-N` of the repository. The files that resume a run stay in `output_dir`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.trainer
from accelerate.logging import get_logger
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from grpo_ext.report.hub import PublishingClient, check_write_access
from grpo_ext.report.metrics_file import metrics_path
from grpo_ext.report.run_files import draw_or_warn

logger = get_logger(__name__)


class Publisher:
    """Pushes the published files of one run.

    Raises:
        ValueError: `push_to_hub` is on, and the repository cannot be pushed to.
    """

    def __init__(self, args: TrainingArguments):
        self._args = args
        self._pushes: PublishingClient | None = None
        if args.push_to_hub and args.process_index == 0:
            check_write_access(args)

    @property
    def pushes_checkpoints(self) -> bool:
        """Whether a save is followed by a push."""
        return self._args.hub_strategy != HubStrategy.END

    def warn_about_strategy(self) -> None:
        """Warn about a strategy whose name suggests that a run can be resumed from the Hub."""
        strategy = self._args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            logger.warning(
                f"hub_strategy={strategy.value!r} pushes the adapter of a checkpoint but not the optimizer state. A "
                f"run can only be resumed from its output_dir."
            )

    def draw_curves(self) -> None:
        """Draw `curves.png` if something has been logged; an error becomes a warning."""
        from grpo_ext.report.png_plots import draw_curves  # a run without pushes does not need matplotlib

        if metrics_path(self._args).exists():
            draw_or_warn(draw_curves, self._args.output_dir)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """A context in which transformers' trainer pushes through `PublishingClient`."""
        self._pushes = self._pushes or PublishingClient(self._args)
        client = transformers.trainer.hf_api
        transformers.trainer.hf_api = lambda: self._pushes
        try:
            yield
        finally:
            transformers.trainer.hf_api = client
