"""Config values as plain JSON: callables by name, secrets redacted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "(redacted)"
_SECRET = re.compile(r"(^|_)(token|password|passwd|secret|credentials?|api_?key|access_?key)$", re.IGNORECASE)
_URL = re.compile(r"(\w+://)[^/\s@]+@")


def plain(value: Any, *, redact: bool, key: str = "") -> Any:
    """JSON values only. Pure."""
    if isinstance(value, Mapping):
        return {str(name): plain(item, redact=redact, key=str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, redact=redact, key=key) for item in value]
    if redact and value not in (None, "") and isinstance(value, str) and _SECRET.search(key):
        return REDACTED
    if isinstance(value, str):
        return _URL.sub(rf"\1{REDACTED}@", value) if redact else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if callable(value):
        inner = getattr(value, "func", value)
        return f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    return f"({type(value).__module__}:{type(value).__qualname__})"
