"""Implements `disttrain ckpt diff`, which compares the state and the metadata of two checkpoints.

The state is everything that a resumed run continues from: tensors, step, progress, optimizers and user state. The
metadata (config, folder, writer, evaluation) is reported separately. It does not decide whether the checkpoints are
equal, because other settings can save the same state. If the world sizes differ, the state of single ranks (their
generators, objects tracked per rank) is reported but not compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.keep.compare import LargestDifference, StoredTensorDifference, compare_tensors
from disttrain.cli.ckpt.find import select_names
from disttrain.cli.ckpt.formatting import shape_text, table
from disttrain.errors import ConfigError, explain

_METADATA = ("config", "folder", "writer", "evaluation")
_PER_RANK = re.compile(r"user/disttrain/random/|user/.+/rank-\d{5}/|user\..+\.\$ranks(\[|$)")  # the engine's names
_SHOWN = 20
_LEAVES_SHOWN = 8


def diff_checkpoints(a: Checkpoint, b: Checkpoint, pattern: str | None = None) -> dict[str, Any]:
    """Return all differences, or with `pattern` only those of the tensors whose names match. Local.

    Raises CheckpointError for damaged bytes, and ConfigError for a pattern that matches no name.
    """
    ranks_a, ranks_b = (one.manifest.writer.get("ranks") for one in (a, b))
    sizes_differ = ranks_a != ranks_b
    selected = select_names({**a.tensors, **b.tensors}, pattern)
    per_rank = sorted(name for name in selected if sizes_differ and _PER_RANK.match(name))
    wanted = set(selected).difference(per_rank)
    if pattern is not None and not wanted:
        problem = f"it matches only state of single ranks, and A has {ranks_a} ranks and B {ranks_b}"
        fix = "compare checkpoints of equal world size"
        raise ConfigError(explain(f"Cannot compare tensors by --name {pattern}.", problem, fix))
    compared = compare_tensors(a, b, wanted=wanted.__contains__)
    leaves = [] if pattern is not None else list(_differing_leaves(_document(a), _document(b)))
    if sizes_differ:
        leaves = [leaf for leaf in leaves if not _PER_RANK.match(leaf["key"])]
    state = [leaf for leaf in leaves if not _is_metadata(leaf["key"])]
    return {
        "a": str(a.path),
        "b": str(b.path),
        "name": pattern,
        "same": compared.same and not state,
        "only_a": list(compared.only_a),
        "only_b": list(compared.only_b),
        "misfits": [{"name": one.name, "a": _kind(*one.a), "b": _kind(*one.b)} for one in compared.misfits],
        "differences": [_difference(one) for one in compared.differences],
        "equal": compared.equal,
        "state": state,
        "metadata": [leaf for leaf in leaves if _is_metadata(leaf["key"])],
        "per_rank": per_rank,
    }


def _is_metadata(key: str) -> bool:
    return re.split(r"[.\[]", key, maxsplit=1)[0] in _METADATA


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"step": checkpoint.step, **checkpoint.document}


def _kind(shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def _difference(one: StoredTensorDifference) -> dict[str, Any]:
    return {
        "name": one.name,
        **_kind(one.shape, one.dtype),
        "elements": one.numel,
        "differing": one.differing,
        "absolute": _largest(one.absolute),
        "relative": _largest(one.relative),
        "nans": one.nans,
        "nan": _largest(one.nan),
    }


def _largest(one: LargestDifference | None) -> dict[str, Any] | None:
    if one is None:
        return None
    a, b = (str(value) if isinstance(value, complex) else value for value in (one.a, one.b))
    value = {} if math.isnan(one.value) else {"value": one.value}
    return {**value, "at": list(one.at), "a": a, "b": b}


def _differing_leaves(a: Any, b: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield `{key, a, b}` for each value that differs. A side without the key has no entry. Pure."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else name
            if name in a and name in b:
                yield from _differing_leaves(a[name], b[name], inner)
            else:
                yield {"key": inner, **({"a": a[name]} if name in a else {"b": b[name]})}
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differing_leaves(left, right, f"{key}[{index}]")
    elif not _same(a, b):
        yield {"key": key, "a": a, "b": b}


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and a == b)


# ---------------------------------------------------------------------- text


def render_diff(compared: Mapping[str, Any], *, every: bool) -> str:
    """Return names, a table with the largest difference first, the other state, and the metadata, as text. Pure."""
    most = None if every else _SHOWN
    lines = [f"A {compared['a']}", f"B {compared['b']}", ""]
    for side, names in (("A", compared["only_a"]), ("B", compared["only_b"])):
        lines += [f"only in {side}: {name}" for name in names[:most]] + _more(names, most)
    lines += [f"{one['name']}: {_kind_text(one['a'])} in A, {_kind_text(one['b'])} in B" for one in compared["misfits"]]
    shown = compared["differences"][:most]
    if shown:
        head = ("tensor", "shape", "dtype", "differ", "largest", "at", "A", "B", "relative", "at")
        notes = [_nan_lines(one) for one in shown]
        lines += table(head, [_row(one) for one in shown], below=notes) + _more(compared["differences"], most)
    lines += _leaf_lines(compared["state"], most=None if every else _LEAVES_SHOWN)
    if compared["metadata"]:
        lines.append("metadata, which does not count as a difference:")
        lines += [f"  {line}" for line in _leaf_lines(compared["metadata"], most=None if every else _LEAVES_SHOWN)]
    if compared["per_rank"]:
        lines.append(f"{len(compared['per_rank'])} tensors of single ranks are not compared: the world sizes differ")
    return "\n".join([*lines, *([""] if lines[-1] else []), _verdict(compared)])


def _verdict(compared: Mapping[str, Any]) -> str:
    differ = len(compared["differences"]) + len(compared["misfits"]) + len(compared["only_a"]) + len(compared["only_b"])
    state = "" if compared["name"] is not None else ", and all other state"
    if compared["same"]:
        return f"Equal: {compared['equal']} tensors are bit-equal{state}."
    state = "" if compared["name"] is not None else f"; {len(compared['state'])} other values of the state differ"
    return f"{differ} tensors differ, {compared['equal']} are equal{state}."


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    share = f"{one['differing']}/{one['elements']}"
    shape = shape_text(one["shape"])
    largest, relative = one["absolute"], one["relative"]
    if largest is None:
        return (one["name"], shape, one["dtype"], share, "-", "-", "-", "-", "-", "-")
    return (
        one["name"],
        shape,
        one["dtype"],
        share,
        _number(largest["value"], 3),
        _index_text(largest["at"]),
        _number(largest["a"]),
        _number(largest["b"]),
        _number(relative["value"], 3),
        _index_text(relative["at"]),
    )


def _nan_lines(one: Mapping[str, Any]) -> list[str]:
    first = one["nan"]
    if first is None:
        return []
    values = f"first at {_index_text(first['at'])}: {_number(first['a'])} in A, {_number(first['b'])} in B"
    return [f"  NaN on one side in {one['nans']}, {values}"]


def _leaf_lines(leaves: Sequence[Mapping[str, Any]], *, most: int | None) -> list[str]:
    lines = [f"{leaf['key']}: {_side(leaf, 'a')} in A, {_side(leaf, 'b')} in B" for leaf in leaves[:most]]
    return lines + _more(leaves, most)


def _side(leaf: Mapping[str, Any], side: str) -> str:
    if side not in leaf:
        return "absent"
    text = str(leaf[side])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _more(every: Sequence[Any], most: int | None) -> list[str]:
    rest = 0 if most is None else len(every) - most
    return [f"and {rest} more (--all shows them)"] if rest > 0 else []


def _kind_text(kind: Mapping[str, Any]) -> str:
    return f"{kind['dtype']} {shape_text(kind['shape'])}"


def _index_text(at: Sequence[int]) -> str:
    return f"[{','.join(map(str, at))}]"


def _number(value: Any, digits: int = 9) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
