"""Turns nested state into JSON and tensors for a checkpoint, and back into the live objects' types.

Rejects state that is neither JSON nor tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.checkpoint import Shard, full_shard
from disttrain.errors import CheckpointError, explain
from disttrain.strategy.canonical_boxes import copy_part, local_shard


def tracked_shards(name: str, tracked: Any, replica: tuple[int, int]) -> tuple[list[Shard], Any]:
    """Return a tracked object's tensors as shards `user/NAME/PATH`, and the rest of its state as JSON. Local.

    Of a DTensor each rank saves its local part. Any other tensor counts as equal on every rank.
    """
    shards: list[Shard] = []

    def leaf(value: Any, path: str) -> Any:
        if not isinstance(value, Tensor):
            return _plain(value, path)
        shards.append(
            local_shard(path, value) if isinstance(value, DTensor) else full_shard(path, value.detach(), replica)
        )
        return {"$tensor": path}

    return shards, _document(tracked.state_dict(), f"user/{name}", leaf)


def restore_tracked(tracked: Any, document: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore a tracked object's state. Local.

    A tensor is complete, or sharded as the DTensor that the object holds in the same place.
    """
    try:
        like = tracked.state_dict()
    except Exception:  # noqa: BLE001 - an object may have no state before the first load
        like = None
    tracked.load_state_dict(from_json(document, like, tensors))


def tracked_tensor_names(document: Any) -> Iterator[str]:
    """Yield the names of the tensors that a tracked object's saved state refers to. Pure."""
    if isinstance(document, Mapping):
        if "$tensor" in document:
            yield document["$tensor"]
            return
        for item in document.values():
            yield from tracked_tensor_names(item)
    elif isinstance(document, list):
        for item in document:
            yield from tracked_tensor_names(item)


def to_json(value: Any, path: str) -> Any:
    """Return nested state as JSON values. Raises CheckpointError with `path` for other values. Pure."""
    return _document(value, path, _plain)


def _document(value: Any, path: str, leaf: Callable[[Any, str], Any]) -> Any:
    """Return mappings and lists in JSON's form, with `leaf(value, path)` for every other value.

    JSON's keys are text. A mapping with other keys, or with keys that start with `$`, becomes
    `{"$items": [[key, value], ...]}`.
    """
    if isinstance(value, list | tuple):
        return [_document(item, f"{path}/{index}", leaf) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return leaf(value, path)
    items = {key: _document(item, f"{path}/{key}", leaf) for key, item in value.items()}
    if all(isinstance(key, str) and not key.startswith("$") for key in items):
        return items
    for key in items:
        if not (key is None or isinstance(key, bool | int | float | str)):
            _reject(path, f"a key that is a {type(key).__qualname__}")
    return {"$items": [[key, item] for key, item in items.items()]}


def from_json(saved: Any, like: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Reverse `to_json`, with the types that the live state `like` has in the same places. Local.

    `tensors` holds the tensors that a tracked object's state refers to, by name.
    """
    if isinstance(saved, Mapping):
        if "$tensor" in saved:
            assert tensors is not None, "only tracked state refers to tensors"
            return _placed(tensors[saved["$tensor"]], like)
        known = like if isinstance(like, Mapping) else {}
        items = saved["$items"] if "$items" in saved else saved.items()
        found = {key: from_json(item, known.get(key), tensors) for key, item in items}
        if not isinstance(like, dict):
            return found
        made = copy(like)  # a Counter, an OrderedDict, a defaultdict with its factory
        made.clear()
        made.update(found)
        return made
    if isinstance(saved, list):
        others = chain(like if isinstance(like, list | tuple) else (), repeat(None))
        values = [from_json(item, other, tensors) for item, other in zip(saved, others, strict=False)]
        return tuple(values) if isinstance(like, tuple) else values
    if isinstance(like, Tensor) and like.dim() == 0 and isinstance(saved, int | float):
        return like.new_tensor(saved)
    return like if isinstance(like, torch.dtype) else saved


def _placed(value: Tensor, like: Any) -> Tensor:
    """Return a stored tensor, sharded over the ranks as the live tensor is."""
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    sharded = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    copy_part(sharded, value)
    return sharded


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    return str(value) if isinstance(value, torch.dtype) else _reject(path, f"a {type(value).__qualname__}")


def _reject(path: str, found: str) -> Any:
    raise CheckpointError(
        explain(
            f"Cannot save {path}: a checkpoint holds JSON values and tensors, never a pickle.",
            found,
            "return numbers, text, lists, tensors, and mappings with keys of text or numbers from its state_dict",
        )
    )
