"""Values as JSON has them."""

import json
from typing import Any


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON; what JSON has no form for becomes text."""
    return json.loads(json.dumps(value, default=str))
