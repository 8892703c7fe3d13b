"""Turns config values into plain JSON: callables become names, secrets are redacted."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REDACTED = "(redacted)"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_SECRET_WORDS |= {"auth", "authorization", "bearer"}
_KEY_OF = {"api", "access", "private", "signing", "encryption"}
# Words of tokenizers: `pad_token: "<pad>"` is not a secret.
_TEXT_TOKENS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video", "stop", "start", "end"}
_TOKENIZER_WORD = re.compile(r"[<\[].*[>\]]")
_URL = re.compile(r"(\w+://)[^/\s]*@")
_ASSIGNED = re.compile(r"(?i)\b(\w*(?:api_?key|token(?!s|iz)|passw(?:or)?d|secret)\w*=)[^\s&]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)\S+")
_LONG_ENOUGH = 8
"""Length from which a secret is also redacted in other strings. A shorter one would match harmless strings."""


def is_secret(key: str, value: Any = "") -> bool:
    """Whether a key's name says that its value is a secret. Pure.

    Complete words count: `tokens` and `tokenizer` are not secrets. Under a key that ends in `token`, a number is a
    count, and `<|end|>` or `[PAD]` is a special token of a tokenizer.
    """
    words = [word.lower() for word in _WORDS.findall(key)]
    if _SECRET_WORDS & set(words):
        return True
    pairs = list(zip(["", *words], words, strict=False))
    if any(before in _KEY_OF and word in ("key", "keys") for before, word in pairs):
        return True
    if not words or words[-1] != "token" or pairs[-1][0] in _TEXT_TOKENS or isinstance(value, int | float):
        return False
    return not (isinstance(value, str) and _TOKENIZER_WORD.fullmatch(value))


def plain(value: Any, *, redact: bool, key: str = "") -> Any:
    """Return JSON values only. Pure.

    With `redact`, values under a secret's key are redacted, so are copies of them in other strings, and so are
    credentials in URLs.
    """
    secret = redact and is_secret(key, value)
    hidden = sorted(set(_secrets(value, secret)), key=lambda text: (-len(text), text)) if redact else None
    return _plain(value, hidden, secret)


def _secrets(value: Any, secret: bool) -> Iterator[str]:
    """The strings under secrets' keys. A reference may have copied them to other values."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets(item, secret or is_secret(str(name), item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, secret)
    elif secret and isinstance(value, str) and len(value) >= _LONG_ENOUGH:
        yield value


def _plain(value: Any, hidden: Sequence[str] | None, secret: bool) -> Any:
    """Convert `value`. `hidden` are strings to redact wherever they occur; None redacts nothing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        redact = hidden is not None
        return {
            str(name): _plain(item, hidden, secret or (redact and is_secret(str(name), item)))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, hidden, secret) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if secret:
        return REDACTED
    if isinstance(value, str):
        return value if hidden is None else _without_credentials(value, hidden)
    if isinstance(value, int | float):
        return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _name_of(value)


def _without_credentials(text: str, hidden: Sequence[str]) -> str:
    for one in hidden:
        text = text.replace(one, REDACTED)
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
