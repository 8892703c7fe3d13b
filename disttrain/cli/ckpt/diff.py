"""`disttrain ckpt diff`: what differs between two checkpoints as one JSON object, and that object as text.

State is what a resumed run goes on from: tensors, step, progress, optimizers, user state. What lies beside it (config,
who wrote it where, how it evaluated) is told apart: the same state may well be saved by other settings. Of worlds of
different sizes, what belongs to a rank (its generators, what is tracked per rank) cannot be compared, and is only told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.keep.compare import LargestDifference, StoredTensorDifference, compare_tensors
from disttrain.cli.ckpt.pages import named, table
from disttrain.errors import ConfigError, explain

_BESIDE = ("config", "folder", "writer", "evaluation")
_OF_A_RANK = re.compile(r"user/disttrain/random/|user/.+/rank-\d{5}/|user\..+\.\$ranks(\[|$)")  # as the engine names it
_SHOWN = 20
_LEAVES_SHOWN = 8


def diff_checkpoints(a: Checkpoint, b: Checkpoint, pattern: str | None = None) -> dict[str, Any]:
    """All differences; with `pattern` those of the tensors so named alone. Local.

    Raises CheckpointError for damaged bytes, ConfigError for a pattern that fits no name.
    """
    ranks_a, ranks_b = (one.manifest.writer.get("ranks") for one in (a, b))
    unlike = ranks_a != ranks_b
    asked_for = named({**a.tensors, **b.tensors}, pattern)
    lone = sorted(name for name in asked_for if unlike and _OF_A_RANK.match(name))
    wanted = set(asked_for).difference(lone)
    if pattern is not None and not wanted:
        found_lone = f"state of single ranks alone, of {ranks_a} ranks and of {ranks_b}"
        raise ConfigError(explain(f"--name {pattern} is to pick tensors.", found_lone, "compare worlds of one size"))
    found = compare_tensors(a, b, wanted=wanted.__contains__)
    leaves = [] if pattern is not None else list(_leaves_that_differ(_document(a), _document(b)))
    if unlike:
        leaves = [leaf for leaf in leaves if not _OF_A_RANK.match(leaf["key"])]
    state = [leaf for leaf in leaves if not _is_beside(leaf["key"])]
    return {
        "a": str(a.path),
        "b": str(b.path),
        "name": pattern,
        "same": found.same and not state,
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "misfits": [{"name": one.name, "a": _kind(*one.a), "b": _kind(*one.b)} for one in found.misfits],
        "differences": [_difference(one) for one in found.differences],
        "equal": found.equal,
        "state": state,
        "beside": [leaf for leaf in leaves if _is_beside(leaf["key"])],
        "of_ranks": lone,
    }


def _is_beside(key: str) -> bool:
    return re.split(r"[.\[]", key, maxsplit=1)[0] in _BESIDE


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


def _leaves_that_differ(a: Any, b: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """`{key, a, b}` of each value that is not the same; one that is missing on a side has no entry for it. Pure."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else name
            if name in a and name in b:
                yield from _leaves_that_differ(a[name], b[name], inner)
            else:
                yield {"key": inner, **({"a": a[name]} if name in a else {"b": b[name]})}
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for place, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _leaves_that_differ(left, right, f"{key}[{place}]")
    elif not _same(a, b):
        yield {"key": key, "a": a, "b": b}


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and a == b)


# ---------------------------------------------------------------------- text


def render_diff(found: Mapping[str, Any], *, every: bool) -> str:
    """Names, a table with the largest difference first, the rest of the state, what lies beside. Pure."""
    most = None if every else _SHOWN
    lines = [f"A {found['a']}", f"B {found['b']}", ""]
    for side, names in (("A", found["only_a"]), ("B", found["only_b"])):
        lines += [f"only in {side}: {name}" for name in names[:most]] + _more(names, most)
    lines += [f"{one['name']}: {_kind_text(one['a'])} in A, {_kind_text(one['b'])} in B" for one in found["misfits"]]
    shown = found["differences"][:most]
    if shown:
        head = ("tensor", "shape", "dtype", "differ", "largest", "at", "A", "B", "relative", "at")
        notes = [_nan_lines(one) for one in shown]
        lines += table(head, [_row(one) for one in shown], below=notes) + _more(found["differences"], most)
    lines += _leaf_lines(found["state"], most=None if every else _LEAVES_SHOWN)
    if found["beside"]:
        lines.append("beside the state, which counts for nothing here:")
        lines += [f"  {line}" for line in _leaf_lines(found["beside"], most=None if every else _LEAVES_SHOWN)]
    if found["of_ranks"]:
        lines.append(f"{len(found['of_ranks'])} tensors of single ranks are not compared: the worlds' sizes differ")
    return "\n".join([*lines, *([""] if lines[-1] else []), _verdict(found)])


def _verdict(found: Mapping[str, Any]) -> str:
    differ = len(found["differences"]) + len(found["misfits"]) + len(found["only_a"]) + len(found["only_b"])
    state = "" if found["name"] is not None else ", and the state beside them"
    if found["same"]:
        return f"Equal: {found['equal']} tensors bit for bit{state}."
    state = "" if found["name"] is not None else f"; {len(found['state'])} other values of the state differ"
    return f"{differ} tensors differ, {found['equal']} are equal{state}."


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    share = f"{one['differing']}/{one['elements']}"
    shape = "x".join(map(str, one["shape"])) or "scalar"
    largest, relative = one["absolute"], one["relative"]
    if largest is None:
        return (one["name"], shape, one["dtype"], share, "-", "-", "-", "-", "-", "-")
    return (
        one["name"],
        shape,
        one["dtype"],
        share,
        _number(largest["value"], 3),
        _place(largest["at"]),
        _number(largest["a"]),
        _number(largest["b"]),
        _number(relative["value"], 3),
        _place(relative["at"]),
    )


def _nan_lines(one: Mapping[str, Any]) -> list[str]:
    first = one["nan"]
    if first is None:
        return []
    told = f"first at {_place(first['at'])}: {_number(first['a'])} in A, {_number(first['b'])} in B"
    return [f"  NaN on one side in {one['nans']}, {told}"]


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
    return f"{kind['dtype']} {'x'.join(map(str, kind['shape'])) or 'scalar'}"


def _place(at: Sequence[int]) -> str:
    return f"[{','.join(map(str, at))}]"


def _number(value: Any, digits: int = 9) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
