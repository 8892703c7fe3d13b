"""Restores a checkpoint's state into a run's prepared parts, or weights alone.

First everything that can be checked is checked, then tensors are filled. Optimizers, schedules, tracked objects and
generators are set only when every rank has all tensors. Raises CheckpointError on every rank where one rank fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from disttrain.checkpoint import Checkpoint, Differences, Location, Shard
from disttrain.checkpoint.formats import NativeWeights, Rename, WantedBox, match_weights
from disttrain.engine.checkpointing.documents import restore_tracked, tracked_tensor_names
from disttrain.engine.checkpointing.frozen_parameters import left_out_tensors, reject_other_frozen_parameters
from disttrain.engine.checkpointing.locate import open_any_together, reject_unknown_model
from disttrain.engine.checkpointing.optimizer_groups import restore_optimizer
from disttrain.engine.checkpointing.random_state import restore_random
from disttrain.engine.checkpointing.run_identity import reject_another_run
from disttrain.engine.checkpointing.snapshot import RANKS, Parts, Progress, Tracked, frozen_names
from disttrain.errors import CheckpointError, DamagedError, explain
from disttrain.logs import package_logger
from disttrain.strategy import Prepared

_log = package_logger("checkpoint")


class Restoring:
    """Restores prepared parts in two acts: `fill` for each candidate, then `finish` with the intact checkpoint.

    Where `finish` raises or no candidate is intact, parts that were `touched` must not be used. Collective.
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
        """Whether models or optimizers were written to. Equal on all ranks."""

    def fill(self, checkpoint: Checkpoint) -> None:
        """Check a candidate, then read this rank's part of trained parameters, buffers and optimizers.

        Raises DamagedError on the rank that finds damaged bytes: another candidate may be intact. `finish` raises any
        other error, because an older checkpoint would not help. Frozen parameters wait for `finish`: an older candidate
        may leave them out, and the values of a rejected candidate would stay.
        """
        self._filled, self._error = checkpoint, None
        try:
            self._make_ready(lambda: self._check(checkpoint))
            self.touched = True
            checkpoint.load_into(self._trained, strict=False)
        except DamagedError:
            raise
        except Exception as error:  # noqa: BLE001 - `finish` raises it on all ranks
            self._error = error

    def finish(self, checkpoint: Checkpoint) -> Progress:
        """Restore the rest of a checkpoint that `fill` has read, or all of another one. Every rank checks first."""
        filled = self._filled is checkpoint
        if filled:
            self._together(self._raise_error)
        if left_out_tensors(checkpoint):
            self._check_frozen(checkpoint)
        if not filled:
            self._make_ready(lambda: self._check(checkpoint))
            self._make_ready(lambda: checkpoint.check([*self._trained, *self._frozen]))
            self.touched = True
        rest = self._frozen if filled else [*self._trained, *self._frozen]
        self._together(lambda: checkpoint.load_into(rest, strict=False))
        self._together(lambda: self._set(checkpoint))
        for prepared in self._parts.prepared.values():
            self._parts.strategy.loaded(prepared)
        return Progress(**checkpoint.document["progress"])

    def _make_ready(self, act: Callable[[], object]) -> None:
        """Call `act` on all ranks, and undo its preparations where it fails."""
        try:
            self._together(act)
        except BaseException:
            self._forget()
            raise

    def _together(self, act: Callable[[], object]) -> None:
        self._parts.world.group.together(act, "loading the checkpoint")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _check(self, checkpoint: Checkpoint) -> None:
        """Raise for what does not fit, before anything is written. Then allocate what the checkpoint holds."""
        parts, document = self._parts, checkpoint.document
        with _as_checkpoint_errors(checkpoint):
            if "imported" in document:  # a checkpoint from another library has no config
                _reject_weights_alone(checkpoint)
            else:
                reject_another_run(str(checkpoint.path), document["config"], parts.config.to_dict())
            missing = [name for name in parts.prepared if name not in document["optim"]]
            if missing:
                raise CheckpointError(
                    explain(
                        f"Cannot continue the prepared models {', '.join(parts.prepared)} from {checkpoint.path}.",
                        f"it holds {', '.join(document['optim'])}",
                        "prepare the same models under the same names",
                    )
                )
            rank = parts.world.group.rank
            self._states = {name: _state_of(checkpoint, name, one, rank) for name, one in parts.tracked.items()}
            self._forget()
            self._allocate(checkpoint)

    def _allocate(self, checkpoint: Checkpoint) -> None:
        parts, frozen = self._parts, frozen_names(self._parts.prepared)
        every: list[Shard] = []
        for prepared in parts.prepared.values():
            every += parts.strategy.shards(prepared, checkpoint.tensors)
        every = [shard for shard in every if shard.name not in left_out_tensors(checkpoint)]
        checkpoint.check_fit(every, ignore={name for name in checkpoint.tensors if name.startswith("user/")})
        self._trained = [shard for shard in every if shard.name not in frozen]
        self._frozen = [shard for shard in every if shard.name in frozen]

    def _forget(self) -> None:
        """Reset the optimizers' state to what they started with. Another candidate may hold less state."""
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

    def _check_frozen(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError on every rank where the frozen parameters differ from those the checkpoint left out."""
        parts, stored, group = self._parts, left_out_tensors(checkpoint), self._parts.world.group

        def left_out() -> list[Shard]:
            every = [shard for prepared in parts.prepared.values() for shard in parts.strategy.shards(prepared)]
            return [shard for shard in every if shard.name in stored]

        found = parts.frozen.compute(group.together(left_out, "checking the frozen parameters"), group)
        reject_other_frozen_parameters(checkpoint, stored, found)


def _rows_of(prepared: Prepared) -> dict[Any, frozenset[str]]:
    """Return the keys of the optimizer's state of each parameter. Other state of the optimizer is ignored."""
    state = prepared.optimizer.state if prepared.optimizer is not None else {}
    return {parameter: frozenset(row) for parameter, row in state.items() if isinstance(row, dict)}


@contextmanager
def _as_checkpoint_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors from an incomplete document into CheckpointError."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            explain(
                f"Cannot load {checkpoint.path}.",
                f"{type(error).__name__}: {error}",
                "remove or repair it: the run then continues from the checkpoint before",
            )
        ) from error


def _reject_weights_alone(checkpoint: Checkpoint) -> None:
    if not checkpoint.document["optim"]:
        raise CheckpointError(
            explain(
                f"Cannot continue from {checkpoint.path}.",
                "it holds weights alone, converted from another library's checkpoint",
                f"start from them: model.weights={checkpoint.path}",
            )
        )


def _state_of(checkpoint: Checkpoint, name: str, tracked: Tracked, rank: int) -> Any:
    """Return the saved state of a tracked object; None for a rank that has none and keeps its current state. Local."""
    users = checkpoint.document["user"]
    saved = users.get(name)
    if saved is None:
        raise CheckpointError(
            explain(
                f"Cannot restore the tracked object {name!r} from {checkpoint.path}.",
                f"its tracked objects: {', '.join(users) or 'none'}",
                "track the same names as when it was saved",
            )
        )
    per_rank = isinstance(saved, Mapping) and set(saved) == {RANKS}
    if per_rank != tracked.per_rank:
        held, option = ("one state for each rank", "with") if per_rank else ("one state for all ranks", "without")
        raise CheckpointError(
            explain(
                f"Cannot restore the tracked object {name!r} from {checkpoint.path}.",
                f"it holds {held}",
                f"track it {option} per_rank=True",
            )
        )
    if not per_rank:
        return saved
    states = saved[RANKS]
    if rank >= len(states):
        _log.warning("rank %d keeps its %r: the checkpoint holds it for %d ranks", rank, name, len(states))
        return None
    return states[rank]


def others_than(checkpoint: Checkpoint, name: str) -> set[str]:
    """Return every stored tensor that is not a weight of the model `name`. Pure."""
    return {stored for stored in checkpoint.tensors if not stored.startswith(f"model/{name}/")}


def load_weights(
    parts: Parts, name: str, path: str | Location, *, strict: bool, only: Sequence[str], rename: Rename | None
) -> Differences:
    """Load one model's tensors from any format that `open_weights` knows. Each rank reads its boxes.

    Nothing is written on any rank before all ranks have checked names, shapes and, in a checkpoint, every byte.
    """
    prepared, group, what = parts.prepared[name], parts.world.group, f"loading weights from {path}"
    weights = open_any_together(path, name, group)

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
            fix="use the model of these weights; if some may differ, set model.weights_strict=false, or call "
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
    """Return the further names of tied parameters, each with the first name, which is canonical. Local."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = [(name, first.setdefault(id(parameter), name)) for name, parameter in named]
    return {name: canonical for name, canonical in pairs if name != canonical}


def load_for_evaluation(parts: Parts, name: str, checkpoint: Checkpoint) -> None:
    """Load the weights and the update count of one prepared model and its objective, and nothing else.

    Raises CheckpointError where the checkpoint is another run's, or names or shapes differ.
    """
    reject_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
    reject_unknown_model(checkpoint, name)
    _load(parts, name, checkpoint, lambda shard: True)
    parts.prepared[name].updates = int(checkpoint.document["optim"][name]["updates"])  # random numbers are keyed by it


def _load(parts: Parts, name: str, checkpoint: Checkpoint, wanted: Callable[[Shard], bool]) -> None:
    prepared = parts.prepared[name]

    def fill() -> None:
        shards = [shard for shard in parts.strategy.shards(prepared) if wanted(shard)]
        checkpoint.load_into(shards, ignore=others_than(checkpoint, name) - {shard.name for shard in shards})

    parts.world.group.together(fill, "loading weights")
    parts.strategy.loaded(prepared)
