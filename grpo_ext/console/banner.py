"""The banner before the first step: what the run will do, in plain words."""

from rich.panel import Panel
from rich.table import Table
from trl import GRPOTrainer

from grpo_ext.console.terminal import show
from grpo_ext.run_description import describe_run


def show_banner(trainer: GRPOTrainer, *, model_name: str, data: str) -> None:
    """Print the banner on the main process; for the arguments, see `describe_run`."""
    if not trainer.accelerator.is_main_process:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in describe_run(trainer, model_name=model_name, data=data).items():
        table.add_row(label, text)
    show(Panel(table, title="GRPO", title_align="left", expand=False))
