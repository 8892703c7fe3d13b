"""What a command prints for programs under `--json`: strict JSON on one line."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """`value` as JSON; a number that is not finite, which JSON has no form for, as text. Pure."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
