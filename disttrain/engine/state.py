"""What a run is and where it stands: its identity, and the state that a checkpoint carries beside the tensors.

Refuses to continue a folder that holds another run, and tracked state that is not JSON and tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from disttrain.checkpoint import Shard, whole_shard
from disttrain.errors import CheckpointError, explain
from disttrain.strategy import Prepared

IDENTITY = (
    "run.seed",
    "model.target",
    "model.args",
    "objective.target",
    "objective.args",
    "data.train",
    "data.collate",
    "data.global_batch",
    "data.shuffle",
    "data.last",
    "optim.target",
)
"""What makes a run that run; everything else may differ when it continues."""


_NO_SETTINGS = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")
"""What of a parameter group says how a step is computed, not what: each strategy and device chooses its own."""


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The identifying part of a resolved config, by dotted key. Pure."""
    found: dict[str, Any] = {}
    for key in IDENTITY:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = value
    return found


def refuse_another_run(folder: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise CheckpointError with every difference between the run in a folder and the one asked for."""
    before, now = identity_of(theirs), identity_of(mine)
    differing = [key for key in IDENTITY if before[key] != now[key]]
    if not differing:
        return
    lines = "".join(f"\n    {key}: {before[key]!r} there, {now[key]!r} asked for" for key in differing)
    raise CheckpointError(
        explain(
            f"{folder} is to be continued.",
            f"it holds another run:{lines}",
            "set another run.name, or the values it was started with; to start from its weights, "
            "set another run.name and model.weights",
        )
    )


def optimizer_document(prepared: Prepared) -> dict[str, Any]:
    """Kind, hyperparameters of every group, and the schedule's state, as JSON."""
    optimizer, schedule = prepared.optimizer, prepared.schedule
    return {
        "updates": prepared.updates,
        "optimizer": None if optimizer is None else f"{type(optimizer).__module__}:{type(optimizer).__qualname__}",
        "groups": []
        if optimizer is None
        else [
            {"members": list(members), **_plain_group(group)}
            for members, group in zip(prepared.members, optimizer.param_groups, strict=True)
        ],
        "schedule": None if schedule is None else _jsonable(schedule.state_dict(), f"schedule of {prepared.name!r}"),
    }


def restore_optimizer(prepared: Prepared, document: Mapping[str, Any], *, same_settings: bool) -> None:
    """Put groups and schedule back. With other settings than saved, the new ones hold from here on. Local.

    Raises CheckpointError where a schedule that is no function of the step is to go on with other settings.
    """
    prepared.updates = int(document["updates"])
    optimizer, schedule = prepared.optimizer, prepared.schedule
    if optimizer is None:
        return
    closed_form = schedule is None or isinstance(schedule, LambdaLR)
    if not same_settings and not closed_form:
        raise CheckpointError(
            explain(
                f"The run of {prepared.name!r} is to continue with other optim.args or another schedule.",
                f"schedule {type(schedule).__qualname__}, whose past cannot be recomputed for new settings",
                "keep the settings, or use constant, linear, cosine or warmup_stable_decay",
            )
        )
    if same_settings:
        if not closed_form and len(document["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                explain(
                    f"The schedule {type(schedule).__qualname__} of {prepared.name!r} is to continue.",
                    f"{len(document['groups'])} parameter groups then, {len(optimizer.param_groups)} now",
                    "keep the strategy, or use constant, linear, cosine or warmup_stable_decay",
                )
            )
        for members, group in zip(prepared.members, optimizer.param_groups, strict=True):
            _restore_group(group, _group_of(members, document["groups"], prepared.name))
    if schedule is not None and document["schedule"] is not None:
        _restore_schedule(schedule, document["schedule"], same_settings=same_settings)


def _group_of(members: Sequence[str], saved: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The saved group that these parameters were in: strategies may group them otherwise."""
    for group in saved:
        if set(members) <= set(group["members"]):
            return group
    raise CheckpointError(
        explain(
            f"The optimizer of {name!r} is to continue with the settings of each parameter group.",
            f"no saved group that holds {', '.join(members[:3]) or 'no parameter'}",
            "group the parameters as they were when it was saved",
        )
    )


def _restore_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if key != "members":
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _restore_schedule(schedule: LRScheduler, saved: dict[str, Any], *, same_settings: bool) -> None:
    if not isinstance(schedule, LambdaLR):
        schedule.load_state_dict(saved)
        return
    if same_settings:
        schedule.load_state_dict(saved)
    else:
        schedule.last_epoch = saved["last_epoch"]
        schedule._step_count = saved["_step_count"]
    # From the function itself: a larger run.steps changes it. Equal bit for bit where nothing changed.
    rates = [
        base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def tracked_shards(name: str, tracked: Any, replica: tuple[int, int]) -> tuple[list[Shard], Any]:
    """A tracked object's state: its tensors as replicated shards `user/NAME/PATH`, the rest as JSON. Local."""
    shards: list[Shard] = []
    document = _split(tracked.state_dict(), f"user/{name}", shards, replica)
    return shards, document


def restore_tracked(tracked: Any, document: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a tracked object its state back. Local."""
    tracked.load_state_dict(_join(document, tensors))


def _split(value: Any, path: str, shards: list[Shard], replica: tuple[int, int]) -> Any:
    if isinstance(value, Tensor):
        shards.append(whole_shard(path, value.detach(), replica))
        return {"$tensor": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            _refuse(path, value)
        return {key: _split(item, f"{path}/{key}", shards, replica) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{index}", shards, replica) for index, item in enumerate(value)]
    return _jsonable(value, path)


def _join(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(document, Mapping):
        if "$tensor" in document:
            return tensors[document["$tensor"]]
        return {key: _join(item, tensors) for key, item in document.items()}
    if isinstance(document, list):
        return [_join(item, tensors) for item in document]
    return document


def tracked_tensor_names(document: Any) -> Iterator[str]:
    """The names of the tensors that a tracked object's saved state refers to. Pure."""
    if isinstance(document, Mapping):
        if "$tensor" in document:
            yield document["$tensor"]
            return
        for item in document.values():
            yield from tracked_tensor_names(item)
    elif isinstance(document, list):
        for item in document:
            yield from tracked_tensor_names(item)


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _jsonable(value, f"group.{key}") for key, value in group.items() if key not in _NO_SETTINGS}


def _jsonable(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _jsonable(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item, path) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return _refuse(path, value)


def _refuse(path: str, value: Any) -> Any:
    raise CheckpointError(
        explain(
            f"{path} is to be saved; a checkpoint holds JSON values and tensors, never a pickle.",
            f"a {type(value).__qualname__}",
            "let its state_dict return numbers, text, lists, mappings with text keys, and tensors",
        )
    )
