"""Hide messages of other libraries that a user cannot act on. Libraries are imported only when it is called."""

import logging
import warnings


def quiet_libraries() -> None:
    """Hide deprecations that TRL itself triggers, messages of bitsandbytes, and progress bars of short tasks.

    Only for scripts and commands, because it changes settings of the process. Messages that a library prints when it is
    imported are hidden only if this is called first.
    """
    # Renamed in transformers 5.23; TRL 1.16 uses the old names.
    warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends an optional package when it is imported
    import datasets

    datasets.disable_progress_bars()
