"""Maps tensors in containers, and reads how often a tensor was written into."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from disttrain.torch_internals.access import check, choose, private, reader, small_tensor


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return the same containers with each tensor replaced by `function(tensor)`. Local.

    Containers are lists, tuples, named tuples and dicts, and the classes that are registered with torch's pytree.
    """
    return _tree_map()(function, tree)


@cache
def _tree_map() -> Callable[[Callable[[Tensor], Any], Any], Any]:
    def probed() -> Callable[[Callable[[Tensor], Any], Any], Any]:
        tree_map_only = private("torch.utils._pytree", "tree_map_only")
        found = tree_map_only(Tensor, torch.neg, {"a": [small_tensor(1.0), "text"]})
        check(found["a"] == [small_tensor(-1.0), "text"], "tree_map_only")
        return lambda function, tree: tree_map_only(Tensor, function, tree)

    public: Callable[[Callable[[Tensor], Any], Any], Any] = _map_containers
    return choose("torch.utils._pytree.tree_map_only", public, probed)


def _map_containers(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Map the containers of Python's standard library. Their subclasses are leaves, as they are in torch's pytree."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        return function(tree)
    if kind in (list, tuple):
        return kind(_map_containers(function, item) for item in tree)
    if kind is deque:
        return deque((_map_containers(function, item) for item in tree), tree.maxlen)
    if isinstance(tree, tuple) and _is_named_tuple(kind):
        return kind(*(_map_containers(function, item) for item in tree))
    if kind in (dict, OrderedDict, defaultdict):
        mapped = tree.copy()  # a defaultdict keeps its factory
        mapped.update({key: _map_containers(function, value) for key, value in tree.items()})
        return mapped
    return tree


def _is_named_tuple(kind: type) -> bool:
    """Whether a class was made by `collections.namedtuple` or `typing.NamedTuple`."""
    return issubclass(kind, tuple) and kind.__bases__ == (tuple,) and hasattr(kind, "_asdict")


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written into, as autograd counts it. Local.

    Return None where this torch has no such count. Raise RuntimeError for a tensor made in inference mode.
    """
    read = version_reader()
    return None if read is None else read(tensor)


@cache
def version_reader() -> Callable[[Tensor], int] | None:
    """Return the function behind `version_of`, for loops over many tensors, or None."""

    def probed() -> Callable[[Tensor], int] | None:
        read, tensor = reader("_version"), small_tensor(1.0)
        before = read(tensor)
        tensor.add_(1.0)
        check(read(tensor) == before + 1, "_version")
        return read

    return choose("torch.Tensor._version", None, probed)
