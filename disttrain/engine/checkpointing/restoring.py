"""Putting a checkpoint's state back into a run's prepared parts; or weights alone.

Owns the order: what can be judged is judged first, then tensors are filled, and only when every rank has everything are
optimizers, schedules, tracked objects and generators set. Raises CheckpointError on every rank where one cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from disttrain.checkpoint import Checkpoint, Differences, Location, Shard
from disttrain.checkpoint.formats import NativeWeights, Rename, WantedBox, match_weights
from disttrain.engine.checkpointing.documents import (
    refuse_another_run,
    restore_optimizer,
    restore_tracked,
    tracked_tensor_names,
)
from disttrain.engine.checkpointing.frozen_parameters import base_of, refuse_other_base
from disttrain.engine.checkpointing.opening import open_any_same, refuse_unknown
from disttrain.engine.checkpointing.random_state import restore_random
from disttrain.engine.checkpointing.snapshot import RANKS, Parts, Progress, Tracked, frozen_names
from disttrain.errors import CheckpointError, DamagedError, explain
from disttrain.logs import package_logger
from disttrain.strategy import Prepared

_log = package_logger("checkpoint")


class Restoring:
    """Of prepared parts, in two acts: `fill` for each candidate, then `finish` with the one that is whole.

    Where `finish` raises or no candidate is whole, the parts are not to be used if they were `touched`. Collective.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._rows = [(prepared, _rows_of(prepared)) for prepared in parts.prepared.values()]
        self._filled: Checkpoint | None = None
        self._error: Exception | None = None
        self._states: dict[str, Any] = {}
        self._trained: list[Shard] = []
        self._frozen: list[Shard] = []
        self.touched = False
        """Whether anything was written into models or optimizers; the same on all ranks."""

    def fill(self, checkpoint: Checkpoint) -> None:
        """Judge what is asked, then read what this rank holds of trained parameters, buffers and optimizers.

        Raises DamagedError where bytes do not fit, on the rank that finds it: another candidate may do. Any other error
        is `finish`'s to raise, for an older checkpoint would not help. Frozen parameters wait for `finish`: an older
        candidate may leave them out, and what a rejected one had would stay.
        """
        self._filled, self._error = checkpoint, None
        try:
            self._make_ready(lambda: self._judge(checkpoint))
            self.touched = True
            checkpoint.load_into(self._trained, strict=False)
        except DamagedError:
            raise
        except Exception as error:  # noqa: BLE001 - the other ranks are to hear of it, and will in `finish`
            self._error = error

    def finish(self, checkpoint: Checkpoint) -> Progress:
        """Set all that `fill` did not; where it has not seen this checkpoint, all, once every rank has checked."""
        filled = self._filled is checkpoint
        if filled:
            self._together(self._tell)
        if base_of(checkpoint):
            self._check_base(checkpoint)
        if not filled:
            self._make_ready(lambda: self._judge(checkpoint))
            self._make_ready(lambda: checkpoint.check([*self._trained, *self._frozen]))
            self.touched = True
        rest = self._frozen if filled else [*self._trained, *self._frozen]
        self._together(lambda: checkpoint.load_into(rest, strict=False))
        self._together(lambda: self._set(checkpoint))
        for prepared in self._parts.prepared.values():
            self._parts.strategy.loaded(prepared)
        return Progress(**checkpoint.document["progress"])

    def _make_ready(self, act: Callable[[], object]) -> None:
        """Together, and as if nothing had been where it fails."""
        try:
            self._together(act)
        except BaseException:
            self._forget()
            raise

    def _together(self, act: Callable[[], object]) -> None:
        self._parts.world.group.together(act, "loading the checkpoint")

    def _tell(self) -> None:
        if self._error is not None:
            raise self._error

    def _judge(self, checkpoint: Checkpoint) -> None:
        """Raise for what does not fit, before anything is written; else make room for the state that it has."""
        parts, document = self._parts, checkpoint.document
        with _as_checkpoint_errors(checkpoint):
            if "imported" in document:  # what came from another library knows no config
                _refuse_weights_alone(checkpoint)
            else:
                refuse_another_run(str(checkpoint.path), document["config"], parts.config.to_dict())
            missing = [name for name in parts.prepared if name not in document["optim"]]
            if missing:
                raise CheckpointError(
                    explain(
                        f"{checkpoint.path} is to continue the prepared models {', '.join(parts.prepared)}.",
                        f"it holds {', '.join(document['optim'])}",
                        "prepare the same models under the same names",
                    )
                )
            rank = parts.world.group.rank
            self._states = {name: _state_of(checkpoint, name, one, rank) for name, one in parts.tracked.items()}
            self._forget()
            self._make_room(checkpoint)

    def _make_room(self, checkpoint: Checkpoint) -> None:
        parts, frozen = self._parts, frozen_names(self._parts.prepared)
        every: list[Shard] = []
        for prepared in parts.prepared.values():
            every += parts.strategy.shards(prepared, checkpoint.tensors)
        every = [shard for shard in every if shard.name not in base_of(checkpoint)]
        checkpoint.check_fit(every, ignore={name for name in checkpoint.tensors if name.startswith("user/")})
        self._trained = [shard for shard in every if shard.name not in frozen]
        self._frozen = [shard for shard in every if shard.name in frozen]

    def _forget(self) -> None:
        """Optimizers have the state they came with: what was made for another candidate may not be in this one."""
        self._trained, self._frozen = [], []
        for prepared, before in self._rows:
            prepared.loading.clear()
            for parameter, row in _rows_of(prepared).items():
                for key in row - before.get(parameter, frozenset()):
                    del prepared.optimizer.state[parameter][key]  # type: ignore[union-attr]

    def _set(self, checkpoint: Checkpoint) -> None:
        parts, document = self._parts, checkpoint.document
        now, then = parts.config.to_dict(), document["config"]
        same = "imported" not in document and all(now.get(key) == then.get(key) for key in ("optim", "schedule"))
        with _as_checkpoint_errors(checkpoint):
            for name, prepared in parts.prepared.items():
                restore_optimizer(prepared, document["optim"][name], same_settings=same)
            for name, saved in self._states.items():
                if saved is not None:
                    tensors = {key: checkpoint.read(key) for key in tracked_tensor_names(saved)}
                    restore_tracked(parts.tracked[name].thing, saved, tensors)
            restore_random(checkpoint, parts.world.group.rank, parts.world.device)

    def _check_base(self, checkpoint: Checkpoint) -> None:
        """CheckpointError, on every rank, where the frozen parameters are not those that the checkpoint left out."""
        parts, stored, group = self._parts, base_of(checkpoint), self._parts.world.group

        def left_out() -> list[Shard]:
            every = [shard for prepared in parts.prepared.values() for shard in parts.strategy.shards(prepared)]
            return [shard for shard in every if shard.name in stored]

        found = parts.base.fingerprints(group.together(left_out, "checking the frozen parameters"), group)
        refuse_other_base(checkpoint, stored, found)


def _rows_of(prepared: Prepared) -> dict[Any, frozenset[str]]:
    """The keys of the state that the optimizer has of each parameter. What it keeps besides is not looked at."""
    state = prepared.optimizer.state if prepared.optimizer is not None else {}
    return {parameter: frozenset(row) for parameter, row in state.items() if isinstance(row, dict)}


@contextmanager
def _as_checkpoint_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """What goes wrong with a document that does not hold what it should."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to be loaded.",
                f"{type(error).__name__}: {error}",
                "remove or repair it: the run then goes on from the one before",
            )
        ) from error


def _refuse_weights_alone(checkpoint: Checkpoint) -> None:
    if not checkpoint.document["optim"]:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to be continued.",
                "weights alone, converted from another library's",
                f"start from them: model.weights={checkpoint.path}",
            )
        )


def _state_of(checkpoint: Checkpoint, name: str, tracked: Tracked, rank: int) -> Any:
    """The saved state of a tracked object; None for a rank that has none of its own: it keeps what it has. Local."""
    users = checkpoint.document["user"]
    saved = users.get(name)
    if saved is None:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to give {name!r} its state back.",
                f"tracked objects {', '.join(users) or 'none'}",
                "track what was tracked when it was saved",
            )
        )
    per_rank = isinstance(saved, Mapping) and set(saved) == {RANKS}
    if per_rank != tracked.per_rank:
        found, do = ("a state of each rank", "with") if per_rank else ("one state for the whole world", "without")
        raise CheckpointError(
            explain(f"{checkpoint.path} is to give {name!r} its state back.", found, f"track it {do} per_rank=True")
        )
    if not per_rank:
        return saved
    states = saved[RANKS]
    if rank >= len(states):
        _log.warning("rank %d: the checkpoint has %r of %d ranks; it keeps its own", rank, name, len(states))
        return None
    return states[rank]


def others_than(checkpoint: Checkpoint, name: str) -> set[str]:
    """Every stored tensor that is no weight of the model of that name. Pure."""
    return {stored for stored in checkpoint.tensors if not stored.startswith(f"model/{name}/")}


def load_weights(
    parts: Parts, name: str, path: str | Location, *, strict: bool, only: Sequence[str], rename: Rename | None
) -> Differences:
    """Only the model's own tensors, from any format that `open_weights` knows; each rank reads its boxes.

    Nothing is written on any rank before all have found that names and shapes fit and, in a checkpoint, every byte.
    """
    prepared, group, what = parts.prepared[name], parts.world.group, f"loading weights from {path}"
    weights = open_any_same(path, name, group)

    def match() -> tuple[Differences, list[WantedBox]]:
        shards = [shard for shard in parts.strategy.shards(prepared) if shard.name.startswith(f"model/{name}/")]
        differences, wanted = match_weights(
            weights,
            shards,
            owner=name,
            aliases=other_names(prepared.model),
            strict=strict,
            only=only,
            rename=rename,
            fix="use the model these weights are of; where some are to differ, set model.weights_strict=false, or call "
            "engine.load_weights with strict=False, only=[...] or rename=",
        )
        if isinstance(weights, NativeWeights):
            weights.check(wanted)
        return differences, wanted

    differences, wanted = group.together(match, what)
    group.together(lambda: weights.fill(wanted), what)
    parts.strategy.loaded(prepared)
    return differences


def other_names(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, to the first, which is the canonical one. Local."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = [(name, first.setdefault(id(parameter), name)) for name, parameter in named]
    return {name: canonical for name, canonical in pairs if name != canonical}


def load_for_evaluation(parts: Parts, name: str, checkpoint: Checkpoint) -> None:
    """Weights and updates of one prepared model and of its objective, whatever else the checkpoint holds.

    Raises CheckpointError where it is another run's, or names or shapes differ.
    """
    refuse_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
    refuse_unknown(checkpoint, name)
    _load(parts, name, checkpoint, lambda shard: True)
    parts.prepared[name].updates = int(checkpoint.document["optim"][name]["updates"])  # what draws are keyed by


def _load(parts: Parts, name: str, checkpoint: Checkpoint, wanted: Callable[[Shard], bool]) -> None:
    prepared = parts.prepared[name]

    def fill() -> None:
        shards = [shard for shard in parts.strategy.shards(prepared) if wanted(shard)]
        checkpoint.load_into(shards, ignore=others_than(checkpoint, name) - {shard.name for shard in shards})

    parts.world.group.together(fill, "loading weights")
    parts.strategy.loaded(prepared)
