"""Config values as plain JSON: callables by name, secrets redacted."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "(redacted)"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_SECRET_WORDS |= {"auth", "authorization", "bearer"}
_KEY_OF = {"api", "access", "private", "signing", "encryption"}
# a tokenizer's own: `pad_token: "<pad>"` is no secret
_TEXT_TOKENS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video", "stop", "start", "end"}
_URL = re.compile(r"(\w+://)[^/\s]*@")
_ASSIGNED = re.compile(r"(?i)\b(\w*(?:api_?key|token(?!s|iz)|passw(?:or)?d|secret)\w*=)[^\s&]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)\S+")


def is_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret: words count, not letters (`tokens`, `tokenizer`). Pure."""
    words = [word.lower() for word in _WORDS.findall(key)]
    if _SECRET_WORDS & set(words):
        return True
    pairs = list(zip(["", *words], words, strict=False))
    if any(before in _KEY_OF and word in ("key", "keys") for before, word in pairs):
        return True
    return bool(words) and words[-1] == "token" and pairs[-1][0] not in _TEXT_TOKENS


def plain(value: Any, *, redact: bool, key: str = "") -> Any:
    """JSON values only; with `redact`, nothing under a secret's key and no credentials inside a text. Pure."""
    return _plain(value, redact, redact and is_secret(key))


def _plain(value: Any, redact: bool, secret: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {
            str(name): _plain(item, redact, secret or (redact and is_secret(str(name)))) for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, redact, secret) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if secret:
        return REDACTED
    if isinstance(value, str):
        return _without_credentials(value) if redact else value
    if isinstance(value, int | float):
        return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _name_of(value)


def _without_credentials(text: str) -> str:
    text = _URL.sub(rf"\1{REDACTED}@", text)
    return _BEARER.sub(rf"\1{REDACTED}", _ASSIGNED.sub(rf"\1{REDACTED}", text))


def _name_of(value: Any) -> str:
    if not callable(value):
        return f"({type(value).__module__}:{type(value).__qualname__})"
    if isinstance(value, functools.partial):
        return f"{_name_of(value.func)}.<partial>"
    if not hasattr(value, "__qualname__"):
        return f"{type(value).__module__}:{type(value).__qualname__}.<instance>"
    return f"{value.__module__}:{value.__qualname__}"
