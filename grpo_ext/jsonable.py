"""Convert values to what JSON can hold."""

import json
from typing import Any


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON; anything that JSON cannot hold becomes text."""
    return json.loads(json.dumps(value, default=str))
