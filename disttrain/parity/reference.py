"""Trains the single-process reference of a config, and measures properties of its model and objective.

The reference shares data with the engine, not arithmetic: the constructor under the seed, the order of samples and the
seeds of micro-batches. Sums, gradients, norm, clipping and the step come from `plain_loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import full_shard
from disttrain.checkpoint.formats import match_weights
from disttrain.config import Config
from disttrain.data import Batches, MicroBatch
from disttrain.data.batches import is_stream
from disttrain.engine import build
from disttrain.engine.checkpointing.locate import open_any
from disttrain.engine.checkpointing.restoring import other_names
from disttrain.engine.datasets import to_device
from disttrain.model import build_model
from disttrain.objective import Objective
from disttrain.optim.trials import is_elementwise
from disttrain.parity.plain_loop import plain_loop
from disttrain.parity.recorded import Recorder
from disttrain.strategy import Prepared, World
from disttrain.strategy.construction import name_parameters
from disttrain.strategy.step.arithmetic import seed_micro_batch
from disttrain.torch_internals import map_tensors

NAME = "model"


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics as torch's batch norms do, whatever its class."""
    return hasattr(module, "track_running_stats") and not isinstance(module, _INSTANCE_NORM)


_OF_KIND: Mapping[str, Callable[[nn.Module], bool]] = {
    "dropout": lambda module: isinstance(module, _DROPOUT),
    "batch_norm": lambda module: hasattr(module, "track_running_stats"),
    "everything": lambda module: True,
}


def set_to_evaluation(model: nn.Module, kinds: Sequence[str]) -> None:
    """Puts the model's modules of these kinds (dropout, batch_norm, everything) into evaluation mode. Local."""
    for kind in kinds:
        for module in model.modules():
            if _OF_KIND[kind](module):
                module.training = False


@dataclass
class Plain:
    """A model, its objective, optimizer and data in one process, without a strategy."""

    config: Config
    world: World
    dataset: Any
    objective: Objective
    prepared: Prepared

    @property
    def model(self) -> nn.Module:
        return self.prepared.model

    @property
    def named(self) -> dict[str, Tensor]:
        """The trainable parameters, by name."""
        return {one.name: one.parameter for one in self.prepared.named}

    def batches(self, global_batch: int, micro_batch: int) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of each step on the device, in the order of the run."""
        data = self.config.data
        assert data is not None
        own = data.collate
        collate = build.build_callable(own, "data", self.config.folder, takes=1) if own is not None else None
        steps = Batches(
            self.dataset,
            seed=self.config.run.seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            part=(0, 1),
            shuffle=data.shuffle,
            last=data.last,
            collate=collate,
            on_resume=data.on_resume,
        )
        for step in steps:
            yield [_as_wide(to_device(micro, self.world.device), self.world.dtype) for micro in step]


def build_plain(config: Config, world: World) -> Plain:
    """Builds everything as a careful single-process script would. Runs user code. Local."""
    data = config.data
    assert data is not None
    dataset = build.dataset_of(config, data.train)
    objective = build.objective_of(config)
    if objective.module is not None:
        objective.module.to(device=world.device, dtype=world.dtype)
    model = build_model(build.model_factory(config), seed=config.run.seed, meta=False)
    if config.model is not None and config.model.weights:
        _load_weights(model, config.model.weights, strict=config.model.weights_strict)
    model.to(device=world.device, dtype=world.dtype if world.dtype != torch.float32 else None)
    prepared = Prepared(NAME, model, objective.module)
    prepared.named = name_parameters(model, objective.module)
    return Plain(config, world, dataset, objective, prepared)


def _load_weights(model: nn.Module, path: str, *, strict: bool) -> None:
    ties = other_names(model)
    state = {key: value for key, value in model.state_dict().items() if key not in ties}
    shards = [full_shard(f"model/{NAME}/{key}", value.detach()) for key, value in state.items()]
    weights = open_any(path, NAME)
    weights.fill(match_weights(weights, shards, owner=NAME, aliases=ties, strict=strict)[1])


def _as_wide(micro: MicroBatch, dtype: torch.dtype) -> MicroBatch:
    """Casts float32 tensors to float64 if the model is float64, because such a model accepts no other dtype."""
    if dtype != torch.float64:
        return micro
    widened = map_tensors(lambda one: one.double() if one.dtype == torch.float32 else one, micro.batch)
    return MicroBatch(widened, micro.index, micro.real, micro.samples)


def train_plain(plain: Plain, recorder: Recorder, *, steps: int, micro_batch: int, gradients: bool) -> dict[str, Any]:
    """Runs the plain loop and records its weights, and its gradients if asked. Returns its losses and norms. Local."""
    config, prepared, named, objective = plain.config, plain.prepared, plain.named, plain.objective
    assert config.data is not None and config.optim is not None
    batch = build.samples_of(config.data.global_batch, dataset=plain.dataset, key="data.global_batch")
    total_steps = build.total_steps_of(config, dataset=plain.dataset, global_batch=batch) or steps
    optimizer = build.optimizer_factory_of(config)(prepared.named)
    make_schedule = build.schedule_factory_of(config, total_steps)

    def loss(model: nn.Module, micro: MicroBatch) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        context = seed_micro_batch(plain.world, prepared, micro)
        with plain.world.computing():
            found = objective(model, micro.batch, context)
        return found.totals, found.weights

    def record_gradients(norm: float) -> None:
        tensors = {name: one.grad for name, one in named.items() if one.grad is not None}
        recorder.gradients(prepared.updates + 1, tensors)

    def record_weights() -> None:
        prepared.updates += 1
        recorder.weights(prepared.updates, plain.model.state_dict())

    made = plain.batches(batch, micro_batch)
    first = next(made)
    several = objective.has_weigh and len(objective.weigh(first[0].batch)) > 1
    recorder.weights(0, plain.model.state_dict())
    losses, norms = plain_loop(
        plain.model,
        optimizer,
        islice(chain([first], made), min(steps, total_steps)),
        loss,
        parameters=list(named.values()),
        weigh=(lambda micro: objective.weigh(micro.batch)) if several else None,
        schedule=make_schedule(optimizer) if make_schedule is not None else None,
        clip=config.clip_norm,
        before_clip=record_gradients if gradients else None,
        after_step=record_weights,
    )
    return {"losses": losses, "norms": norms}


# ---------------------------------------------------------------------- properties of model and objective


def probe_plain(plain: Plain, micro_batch: int) -> dict[str, Any]:
    """Measures the user's model, objective and optimizer. Returns the facts as JSON values. Local.

    The facts say whether a forward draws random numbers, whether items of a batch influence one another, which buffers
    a forward changes, and whether the optimizer is elementwise.
    """
    assert plain.config.data is not None
    batch = build.samples_of(plain.config.data.global_batch, dataset=plain.dataset, key="data.global_batch")
    size = min(batch, max(2, micro_batch))
    batch_of_all = next(plain.batches(size, size))[0]
    model = plain.model
    norms = [name for name, module in model.named_modules() if _is_batch_norm(module)]
    before = {name: value.detach().clone() for name, value in model.named_buffers()}
    draws = len({tuple(_totals(plain, batch_of_all, seed)) for seed in (1, 2)}) > 1
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    set_to_evaluation(model, ("everything",))
    if plain.objective.module is not None:
        plain.objective.module.eval()
    return {
        "draws": draws,
        "batch_norms": norms,
        "changing_buffers": changed,
        "couples_items": plain.objective.couples_items,
        "objective": _add_up(plain, size, batch_of_all),
        "elementwise": is_elementwise(build.optimizer_factory_of(plain.config)),
        "stream": is_stream(plain.dataset),
        "trainable": sorted(plain.named),
    }


def _totals(plain: Plain, micro: MicroBatch, seed: int) -> list[float]:
    """Returns the objective's totals of one batch in training mode, under the seed of another micro-batch."""
    another = MicroBatch(micro.batch, micro.index + seed, micro.real, micro.samples)
    return _measure(plain, another)[0]


def _measure(plain: Plain, micro: MicroBatch) -> tuple[list[float], list[float]]:
    context = seed_micro_batch(plain.world, plain.prepared, micro)
    with torch.no_grad(), plain.world.computing():
        found = plain.objective(plain.model, micro.batch, context)
    return [float(one) for one in found.totals.values()], [float(one) for one in found.weights.values()]


def _add_up(plain: Plain, size: int, batch: MicroBatch) -> dict[str, Any] | None:
    """Evaluates the objective on a batch and on two uneven parts of it. Returns None for a batch of one sample.

    The model is in evaluation mode, so that only the objective can see the other items.
    """
    if size < 2:
        return None
    totals, weights = _measure(plain, batch)
    parts = next(plain.batches(size, -(-2 * size // 3)))
    measured = [_measure(plain, part) for part in parts]
    return {
        "samples": [part.samples for part in parts],
        "total": totals,
        "weight": weights,
        "part_totals": [one for one, _ in measured],
        "part_weights": [one for _, one in measured],
    }
