"""Saves and restores the state of an optimizer and its schedule that is not in tensors: kind, parameter groups, rates.

Strategies may group parameters differently, so each live group finds the saved group that held its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from disttrain.engine.checkpointing.documents import from_json, to_json
from disttrain.errors import CheckpointError, explain
from disttrain.optim.combined import Several
from disttrain.strategy import Prepared
from disttrain.strategy.step.loss_scale import LossScale

_NO_SETTINGS = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")
"""Keys of a parameter group that say how a step is computed, not what. Each strategy and device chooses them."""

_NO_GROUPS = ("_schedulers", "_milestones", "_schedule_phases")
"""Lists in the state of torch's schedules whose length does not depend on the number of parameter groups."""


def optimizer_document(prepared: Prepared) -> dict[str, Any]:
    """Return the optimizer's kind, the settings of every group, and the schedule's state, as JSON. Local."""
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
        "schedule": None if schedule is None else to_json(schedule.state_dict(), f"schedule of {prepared.name!r}"),
    }


def _kind(optimizer: Optimizer | None) -> str | list[str] | None:
    """Return the optimizer's class, or the classes of several optimizers."""
    if isinstance(optimizer, Several):
        return [str(_kind(part)) for part in optimizer.parts]
    return None if optimizer is None else f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


def restore_optimizer(prepared: Prepared, document: Mapping[str, Any], *, same_settings: bool) -> None:
    """Restore parameter groups and schedule. Where the settings changed, the new settings apply from here on. Local.

    Raises CheckpointError where the settings changed and the schedule is not a function of the step.
    """
    prepared.updates = int(document["updates"])
    prepared.loss_scale = LossScale(**document.get("loss_scale", {}))  # earlier checkpoints have none
    optimizer, schedule = prepared.optimizer, prepared.schedule
    if optimizer is None:
        return
    closed_form = schedule is None or isinstance(schedule, LambdaLR)
    if not same_settings and not closed_form:
        raise CheckpointError(
            explain(
                f"Cannot continue the run of {prepared.name!r} with other optim.args or another schedule.",
                f"the past of schedule {type(schedule).__qualname__} cannot be recomputed for new settings",
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
    """Return the index of the saved group that held these parameters. Pure.

    Where several groups with equal settings held them together, return the first. Raises CheckpointError where the
    settings differ or a parameter was in no group.
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
    problem = f"no saved group holds {', '.join(lost[:3])}"
    if not lost:
        problem = f"{', '.join(members[:3])}, ... in {len(holders)} saved groups that differ in {', '.join(differing)}"
    raise CheckpointError(
        explain(
            f"Cannot restore the parameter groups of the optimizer of {name!r}.",
            problem,
            "group the parameters as they were when the checkpoint was saved",
        )
    )


def _restore_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if key != "members":
            group[key] = from_json(value, group.get(key))


def _regrouped(saved: Any, live: Any, sources: Sequence[int], count: int, key: str = "") -> Any:
    """Return a schedule's saved state with its lists by group (`base_lrs`, `max_lrs`, ...) in the live groups' order.

    A list by group has `count` saved items, one for each saved group, and one live item for each live group.
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
        schedule.load_state_dict(from_json(saved, schedule.state_dict()))
    if not isinstance(schedule, LambdaLR):
        return
    if not same_settings:
        schedule.load_state_dict(
            {**schedule.state_dict(), **{key: saved[key] for key in ("last_epoch", "_step_count")}}
        )
    # Recomputed, because a larger run.steps changes the function. Bit-equal where nothing changed.
    rates = [
        base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: to_json(value, f"group/{key}") for key, value in group.items() if key not in _NO_SETTINGS}
