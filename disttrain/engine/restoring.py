"""Putting a checkpoint's state back into a run's prepared parts; or weights alone.

Owns the order: what can be judged is judged first, then tensors are filled, and only when every rank has everything are
optimizers, schedules, tracked objects and generators set. Raises CheckpointError on every rank where one cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from disttrain.checkpoint import Checkpoint, Differences, Place, Shard
from disttrain.checkpoint.formats import Rename, load_weights_into
from disttrain.engine.base import base_of, refuse_other_base
from disttrain.engine.opening import open_any_same, refuse_unknown
from disttrain.engine.random_state import restore_random
from disttrain.engine.snapshot import RANKS, Parts, Progress, Tracked
from disttrain.engine.state import refuse_another_run, restore_optimizer, restore_tracked, tracked_tensor_names
from disttrain.errors import CheckpointError, DamagedError, explain
from disttrain.logs import room_logger
from disttrain.strategy import Prepared

_log = room_logger("checkpoint")


class Restoring:
    """Of prepared parts, in two acts: `fill` for each candidate, then `finish` with the one that is whole.

    Where `finish` raises or no candidate is whole, the parts are not to be used if they were `touched`.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._rows = [(prepared, _rows_of(prepared)) for prepared in parts.prepared.values()]
        self._filled: Checkpoint | None = None
        self._error: Exception | None = None
        self._states: dict[str, Any] = {}
        self.touched = False
        """Whether something was written into models or optimizers; the same on all ranks."""

    def fill(self, checkpoint: Checkpoint) -> None:
        """Judge names, shapes and tracked objects, then read what this rank holds of models and optimizers. Local.

        Raises DamagedError where bytes do not fit: another candidate may. Any other error is `finish`'s to raise, for
        an older checkpoint would not help.
        """
        before, self.touched = self.touched, True
        self._filled, self._error = checkpoint, None
        try:
            self._fill(checkpoint)
        except DamagedError:
            raise
        except CheckpointError as error:  # what does not fit is found before anything is written
            self._error, self.touched = error, before
        except Exception as error:  # noqa: BLE001 - the other ranks are to hear of it, and will in `finish`
            self._error = error

    def finish(self, checkpoint: Checkpoint) -> Progress:
        """Set all that is no tensor of a model or an optimizer; fill those first where `fill` did not. Collective."""
        group, what = self._parts.world.group, "loading the checkpoint"
        if self._filled is checkpoint:
            group.together(self._tell, what)
        if base_of(checkpoint):
            self._check_base(checkpoint)
        if self._filled is not checkpoint:
            group.together(lambda: self._fill(checkpoint), what)
            self.touched = True
        group.together(lambda: self._set(checkpoint), what)
        for prepared in self._parts.prepared.values():
            self._parts.strategy.loaded(prepared)
        return Progress(**checkpoint.document["progress"])

    def _tell(self) -> None:
        if self._error is not None:
            raise self._error

    def _fill(self, checkpoint: Checkpoint) -> None:
        with _as_checkpoint_errors(checkpoint):
            self._judge(checkpoint)
            self._forget()
            parts, shards = self._parts, []
            for prepared in parts.prepared.values():
                shards += parts.strategy.shards(prepared, checkpoint.tensors)
            shards = [shard for shard in shards if shard.name not in base_of(checkpoint)]
            checkpoint.load_into(shards, ignore={name for name in checkpoint.tensors if name.startswith("user/")})

    def _judge(self, checkpoint: Checkpoint) -> None:
        parts, document = self._parts, checkpoint.document
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

    def _forget(self) -> None:
        """Optimizers have the state they came with: what was made for another candidate may not be in this one."""
        for prepared, rows in self._rows:
            prepared.loading.clear()
            for parameter, row in prepared.optimizer.state.items() if prepared.optimizer is not None else ():
                for key in set(row) - set(rows.get(parameter, ())):
                    del row[key]

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
    """What state the optimizer has of each parameter."""
    state = prepared.optimizer.state if prepared.optimizer is not None else {}
    return {parameter: frozenset(row) for parameter, row in state.items()}


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
    parts: Parts, name: str, path: str | Place, *, strict: bool, only: Sequence[str], rename: Rename | None
) -> Differences:
    """Only the model's own tensors, from any format that `open_weights` knows; each rank reads its boxes."""
    prepared = parts.prepared[name]
    weights = open_any_same(path, name, parts.world.group)

    def fill() -> Differences:
        shards = [shard for shard in parts.strategy.shards(prepared) if shard.name.startswith(f"model/{name}/")]
        return load_weights_into(
            weights,
            shards,
            owner=name,
            aliases=other_names(prepared.model),
            strict=strict,
            only=only,
            rename=rename,
            do="use the model these weights are of; where some are to differ, set model.weights_strict=false, or call "
            "engine.load_weights with strict=False, only=[...] or rename=",
        )

    differences = parts.world.group.together(fill, f"loading weights from {path}")
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
