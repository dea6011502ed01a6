"""Pictures that are drawn while a run goes on: what goes wrong in one is said, and does not end the run."""

from collections.abc import Callable
from pathlib import Path

from accelerate.logging import get_logger

logger = get_logger(__name__)


def attempt(picture: Callable[[str], Path], output_dir: str) -> None:
    """Draw a picture of the run in this folder, or warn that it is missing and how to get it."""
    try:
        picture(output_dir)
    except Exception as error:
        logger.warning(
            f"A picture of the run is missing ({error!r}). Once that is mended: grpo-ext report {output_dir}"
        )
