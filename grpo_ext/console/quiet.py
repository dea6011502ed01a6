"""Hides messages of other libraries that a user can do nothing about. Imports no library before it is asked to."""

import logging
import warnings


def quiet_libraries() -> None:
    """Hide deprecations that TRL itself triggers, messages of bitsandbytes, and progress bars of work that takes no
    time.

    For scripts and commands, as it changes settings of the process. Messages that appear when a library is imported are
    hidden only if this is called first.
    """
    # renamed in transformers 5.23; TRL 1.16 uses the old names
    warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for an optional package when it is imported
    import datasets

    datasets.disable_progress_bars()
