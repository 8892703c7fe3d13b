"""What a run is and where it stands: its identity, and the state that a checkpoint carries beside the tensors.

Refuses to continue a folder that holds another run, and tracked state that is not JSON and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from disttrain.checkpoint import Shard, full_shard
from disttrain.errors import CheckpointError, explain
from disttrain.optim.combined import Several
from disttrain.strategy import Prepared
from disttrain.strategy.canonical_boxes import copy_part, local_shard
from disttrain.strategy.step.loss_scale import LossScale

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

_NO_GROUPS = ("_schedulers", "_milestones", "_schedule_phases")
"""Lists in the state of torch's schedules that have a length of their own, whatever the number of parameter groups."""


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The identifying part of a resolved config, by dotted key. Pure."""
    found: dict[str, Any] = {}
    for key in IDENTITY:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = value
    if isinstance(config.get("optim"), list):
        found["optim.target"] = [{key: one[key] for key in ("match", "target")} for one in config["optim"]]
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
        "optimizer": _kind(optimizer),
        "loss_scale": vars(prepared.loss_scale),
        "groups": []
        if optimizer is None
        else [
            {"members": list(members), **_plain_group(group)}
            for members, group in zip(prepared.members, optimizer.param_groups, strict=True)
        ],
        "schedule": None if schedule is None else _jsonable(schedule.state_dict(), f"schedule of {prepared.name!r}"),
    }


def _kind(optimizer: Optimizer | None) -> str | list[str] | None:
    """The optimizer's class, or those of several."""
    if isinstance(optimizer, Several):
        return [str(_kind(part)) for part in optimizer.parts]
    return None if optimizer is None else f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


def restore_optimizer(prepared: Prepared, document: Mapping[str, Any], *, same_settings: bool) -> None:
    """Put groups and schedule back. With other settings than saved, the new ones hold from here on. Local.

    Raises CheckpointError where a schedule that is no function of the step is to go on with other settings.
    """
    prepared.updates = int(document["updates"])
    prepared.loss_scale = LossScale(**document.get("loss_scale", {}))  # earlier checkpoints knew none
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
    state = document["schedule"]
    if same_settings:
        saved = document["groups"]
        sources = [_group_of(members, saved, prepared.name) for members in prepared.members]
        for source, group in zip(sources, optimizer.param_groups, strict=True):
            _restore_group(group, saved[source])
        if schedule is not None:
            state = _regrouped(state, schedule.state_dict(), sources, len(saved))
    if schedule is not None and state is not None:
        _restore_schedule(schedule, state, same_settings=same_settings)


def _group_of(members: Sequence[str], saved: Sequence[Mapping[str, Any]], name: str) -> int:
    """The index of the saved group that these parameters were in: strategies may group them otherwise.

    Of several that held them between them, with equal settings, the first. Raises CheckpointError where there is none.
    """
    for index, group in enumerate(saved):
        if set(members) <= set(group["members"]):
            return index
    holders = [index for index, group in enumerate(saved) if set(members) & set(group["members"])]
    lost = [member for member in members if not any(member in saved[index]["members"] for index in holders)]
    settings = [{**saved[index], "members": None} for index in holders]
    keys = {key for one in settings for key in one}
    differing = sorted(key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings))
    if not lost and not differing:
        return holders[0]
    found = f"no saved group that holds {', '.join(lost[:3])}"
    if not lost:
        found = f"{', '.join(members[:3])}, ... in {len(holders)} saved groups that differ in {', '.join(differing)}"
    raise CheckpointError(
        explain(
            f"The optimizer of {name!r} is to continue with the settings of each parameter group.",
            found,
            "group the parameters as they were when it was saved",
        )
    )


def _restore_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if key != "members":
            group[key] = _restored(value, group.get(key))


def _regrouped(saved: Any, live: Any, sources: Sequence[int], count: int, key: str = "") -> Any:
    """A schedule's saved state with its lists by group (`base_lrs`, `max_lrs`, ...) in the order of the live groups.

    Such a list has `count` items, one a saved group, and is in the live state as long as there are live groups.
    """
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        return {name: _regrouped(item, live.get(name), sources, count, name) for name, item in saved.items()}
    if not isinstance(saved, list) or not isinstance(live, list):
        return saved
    if key not in _NO_GROUPS and (len(saved), len(live)) == (count, len(sources)):
        return [saved[source] for source in sources]
    return [
        _regrouped(item, other, sources, count) for item, other in zip(saved, chain(live, repeat(None)), strict=False)
    ]


def _restore_schedule(schedule: LRScheduler, saved: dict[str, Any], *, same_settings: bool) -> None:
    if same_settings:
        schedule.load_state_dict(_restored(saved, schedule.state_dict()))
    if not isinstance(schedule, LambdaLR):
        return
    if not same_settings:
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
    """A tracked object's state: its tensors as shards `user/NAME/PATH`, the rest as JSON. Local.

    A DTensor is saved by each rank's own part of it, any other tensor as one that every rank holds.
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
    """Give a tracked object its state back: tensors whole, or cut as those that it has already. Local."""
    try:
        like = tracked.state_dict()
    except Exception:  # noqa: BLE001 - it may have no state before it is given one
        like = None
    tracked.load_state_dict(_restored(document, like, tensors))


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
    return {key: _jsonable(value, f"group/{key}") for key, value in group.items() if key not in _NO_SETTINGS}


def _jsonable(value: Any, path: str) -> Any:
    return _document(value, path, _plain)


def _document(value: Any, path: str, leaf: Callable[[Any, str], Any]) -> Any:
    """Mappings and lists as JSON has them, down to each `leaf(value, path)`.

    JSON's keys are text: a mapping with others, or with such as this form uses itself, is `{"$items": [[key, value]]}`.
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
            _refuse(path, f"a key that is a {type(key).__qualname__}")
    return {"$items": [[key, item] for key, item in items.items()]}


def _restored(saved: Any, like: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What `_document` made JSON of; of the kinds that `like`, the live state, has in the same places."""
    if isinstance(saved, Mapping):
        if "$tensor" in saved:
            assert tensors is not None  # only tracked state refers to tensors
            return _placed(tensors[saved["$tensor"]], like)
        known = like if isinstance(like, Mapping) else {}
        items = saved["$items"] if "$items" in saved else saved.items()
        found = {key: _restored(item, known.get(key), tensors) for key, item in items}
        if not isinstance(like, dict):
            return found
        made = copy(like)  # a Counter, an OrderedDict, a defaultdict with its factory
        made.clear()
        made.update(found)
        return made
    if isinstance(saved, list):
        others = chain(like if isinstance(like, list | tuple) else (), repeat(None))
        values = [_restored(item, other, tensors) for item, other in zip(saved, others, strict=False)]
        return tuple(values) if isinstance(like, tuple) else values
    if isinstance(like, Tensor) and like.dim() == 0 and isinstance(saved, int | float):
        return like.new_tensor(saved)
    return like if isinstance(like, torch.dtype) else saved


def _placed(value: Tensor, like: Any) -> Tensor:
    """A stored tensor, cut over the ranks as the live one is."""
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    place = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    copy_part(place, value)
    return place


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    return str(value) if isinstance(value, torch.dtype) else _refuse(path, f"a {type(value).__qualname__}")


def _refuse(path: str, found: str) -> Any:
    raise CheckpointError(
        explain(
            f"{path} is to be saved; a checkpoint holds JSON values and tensors, never a pickle.",
            found,
            "let its state_dict return numbers, text, lists, mappings with keys of text or numbers, and tensors",
        )
    )
