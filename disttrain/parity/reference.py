"""The single-process reference: a plain PyTorch loop, and what can be found out about model and objective by trying.

Shares with the engine what is data, not arithmetic: the constructor under the seed, the order of samples, the seeds of
micro-batches. Sums, gradients, norm, clipping and the step are written out here the plain way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from disttrain.checkpoint import whole_shard
from disttrain.checkpoint.formats import match_weights
from disttrain.config import Config
from disttrain.data import Batches, MicroBatch
from disttrain.data.batches import is_stream
from disttrain.engine import build
from disttrain.engine.checkpointing.opening import open_any
from disttrain.engine.checkpointing.restoring import other_names
from disttrain.engine.device_batches import to_device
from disttrain.model import build_model
from disttrain.objective import Objective
from disttrain.optim.trials import is_elementwise
from disttrain.parity.quiet import batch_norms, silence
from disttrain.parity.recorded import Recorder
from disttrain.strategy import Prepared, World
from disttrain.strategy.construction import name_parameters
from disttrain.strategy.step.arithmetic import seed_micro_batch

NAME = "model"


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
        """The trainable parameters by name."""
        return {one.name: one.parameter for one in self.prepared.named}

    def batches(self, global_batch: int, micro_batch: int) -> Iterator[list[MicroBatch]]:
        """Steps of micro-batches on the device, in the run's order."""
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
    """Everything as a careful single-process script would build it. Runs user code."""
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
    shards = [whole_shard(f"model/{NAME}/{key}", value.detach()) for key, value in state.items()]
    weights = open_any(path, NAME)
    weights.fill(match_weights(weights, shards, owner=NAME, aliases=ties, strict=strict)[1])


def _as_wide(micro: MicroBatch, dtype: torch.dtype) -> MicroBatch:
    """Under float64 a batch's float32 numbers are widened: a model of that type takes no others."""
    if dtype != torch.float64:
        return micro
    widened = tree_map_only(Tensor, lambda one: one.double() if one.dtype == torch.float32 else one, micro.batch)
    return MicroBatch(widened, micro.index, micro.real, micro.samples)


def train_plain(plain: Plain, recorder: Recorder, *, steps: int, micro_batch: int, gradients: bool) -> dict[str, Any]:
    """The plain loop; returns its losses and norms. `gradients` records those too."""
    config, prepared, named = plain.config, plain.prepared, plain.named
    assert config.data is not None and config.optim is not None
    batch = build.samples_of(config.data.global_batch, dataset=plain.dataset, key="data.global_batch")
    total_steps = build.total_steps_of(config, dataset=plain.dataset, global_batch=batch) or steps
    optimizer = build.optimizer_factory_of(config)(prepared.named)
    make_schedule = build.schedule_factory_of(config, total_steps)
    schedule = make_schedule(optimizer) if make_schedule is not None else None
    losses, norms = [], []
    recorder.weights(0, plain.model.state_dict())
    for step in islice(plain.batches(batch, micro_batch), min(steps, total_steps)):
        optimizer.zero_grad()
        loss = _accumulate(plain, step)
        prepared.updates += 1
        norm = None
        if loss is not None:
            norm = _norm(named.values())
            if gradients:
                recorder.gradients(
                    prepared.updates, {name: one.grad for name, one in named.items() if one.grad is not None}
                )
            _step(optimizer, named, config.clip_norm)
            if schedule is not None:
                schedule.step()
        losses.append(loss or 0.0)
        norms.append(norm)
        recorder.weights(prepared.updates, plain.model.state_dict())
    return {"losses": losses, "norms": norms}


def _accumulate(plain: Plain, step: Sequence[MicroBatch]) -> float | None:
    """Gradients of `sum of losses / sum of weights`, and that loss; None for a step of weight zero."""
    world, objective = plain.world, plain.objective
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    several = objective.has_weigh and len(objective.weigh(step[0].batch)) > 1
    if several:
        for micro in step:
            for term, weight in objective.weigh(micro.batch).items():
                weights[term] = weights.get(term, 0.0) + float(weight)
    for micro in step:
        context = seed_micro_batch(world, plain.prepared, micro)
        with world.computing():
            found = objective(plain.model, micro.batch, context)
        parts = [total / (weights[term] or math.inf) if several else total for term, total in found.totals.items()]
        torch.autograd.backward(torch.stack(parts).sum())
        for term, total in found.totals.items():
            totals[term] = totals.get(term, 0.0) + float(total.detach())
            weights[term] = weights[term] if several else weights.get(term, 0.0) + float(found.weights[term])
    if not any(weights.values()):
        return None
    for parameter in plain.named.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not several:
            parameter.grad /= next(iter(weights.values()))
    return sum(totals[term] / weight for term, weight in weights.items() if weight)


def _norm(parameters: Any) -> float:
    return math.sqrt(sum(float(one.grad.double().square().sum()) for one in parameters))


def _step(optimizer: Optimizer, named: Mapping[str, Tensor], clip_norm: float | None) -> None:
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(named.values(), clip_norm)
    optimizer.step()


# ---------------------------------------------------------------------- what model and objective are, by trying


def probe_plain(plain: Plain, micro_batch: int) -> dict[str, Any]:
    """Facts of the user's own parts as JSON: what draws, what sees the whole batch, what an optimizer looks at."""
    assert plain.config.data is not None
    batch = build.samples_of(plain.config.data.global_batch, dataset=plain.dataset, key="data.global_batch")
    size = min(batch, max(2, micro_batch))
    whole = next(plain.batches(size, size))[0]
    model = plain.model
    norms = batch_norms(model)
    before = {name: value.detach().clone() for name, value in model.named_buffers()}
    draws = len({tuple(_totals(plain, whole, seed)) for seed in (1, 2)}) > 1
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    silence(model, ("everything",))
    if plain.objective.module is not None:
        plain.objective.module.eval()
    return {
        "draws": draws,
        "batch_norms": norms,
        "changing_buffers": changed,
        "couples_items": plain.objective.couples_items,
        "objective": _add_up(plain, size, whole),
        "elementwise": is_elementwise(build.optimizer_factory_of(plain.config)),
        "stream": is_stream(plain.dataset),
        "trainable": sorted(plain.named),
    }


def _totals(plain: Plain, micro: MicroBatch, seed: int) -> list[float]:
    """The objective's totals of one batch in training mode, drawn under another micro-batch's seed each time."""
    another = MicroBatch(micro.batch, micro.index + seed, micro.real, micro.samples)
    return _measure(plain, another)[0]


def _measure(plain: Plain, micro: MicroBatch) -> tuple[list[float], list[float]]:
    context = seed_micro_batch(plain.world, plain.prepared, micro)
    with torch.no_grad(), plain.world.computing():
        found = plain.objective(plain.model, micro.batch, context)
    return [float(one) for one in found.totals.values()], [float(one) for one in found.weights.values()]


def _add_up(plain: Plain, size: int, whole: MicroBatch) -> dict[str, Any] | None:
    """The objective on a batch, against what it says of the batch's two uneven parts; None where one sample is all.

    The model is in evaluation mode, so that nothing but the objective can see the other items.
    """
    if size < 2:
        return None
    totals, weights = _measure(plain, whole)
    parts = next(plain.batches(size, -(-2 * size // 3)))
    measured = [_measure(plain, part) for part in parts]
    return {
        "samples": [part.samples for part in parts],
        "total": totals,
        "weight": weights,
        "part_totals": [one for one, _ in measured],
        "part_weights": [one for _, one in measured],
    }
