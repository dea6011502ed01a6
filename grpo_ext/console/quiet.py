"""Messages of other libraries that a user can do nothing about, left out of a recipe's output."""

import warnings

import datasets


def quiet_libraries() -> None:
    """Hide the deprecations that TRL itself runs into, and progress bars of work that takes no time.

    For scripts: it changes the settings of the process.
    """
    # renamed in transformers 5.23; TRL 1.16 uses the old names
    warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
    datasets.disable_progress_bars()
