"""Builds the parts of a run from a config, and checks config and launch before the process group exists.

User code is imported before the group exists, and called only afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.checkpoint import Location
from disttrain.config import Config, Target, build_nested, build_target, check_arguments, resolve_target
from disttrain.config.schema import OptimConfig
from disttrain.engine.checkpointing.locate import checkpoints_of
from disttrain.errors import ConfigError, explain
from disttrain.launch.accelerate import ignored_settings
from disttrain.logs import package_logger
from disttrain.objective import Objective
from disttrain.optim import optimizer_factory, schedule_factory
from disttrain.optim.combined import Part, SeveralFactory
from disttrain.optim.named import MakeOptimizer, MakeSchedule
from disttrain.optim.trials import reject_closures
from disttrain.runtime import (
    Device,
    Group,
    Launch,
    MeshSizes,
    apply_device,
    build_mesh,
    check_device,
    choose_device,
    plan_mesh,
    read_launch,
)
from disttrain.runtime.process_group import launch_of_existing_group
from disttrain.runtime.seeds import seed_everything
from disttrain.strategy import AbstractStrategy, World, strategy_class

_log = package_logger("engine")


@dataclass(frozen=True)
class Plan:
    """The properties of a run that are known before the process group exists."""

    config: Config
    launch: Launch
    device: Device
    sizes: MeshSizes
    strategy: type[AbstractStrategy]
    folder: Path
    checkpoints: Location


def find_launch() -> Launch:
    """Return this process's launch: the launcher's, or that of an existing process group. Raises LaunchError.

    Collective over an existing process group; Local where there is none.
    """
    return launch_of_existing_group(read_launch())


def plan_run(config: Config, launch: Launch | None = None) -> Plan:
    """Choose device, mesh and strategy, and check what depends on the world's size. Local; touches no GPU memory.

    `launch` is read from the environment if it is None. Raises ConfigError and LaunchError.
    """
    launch = read_launch() if launch is None else launch
    if launch.rank == 0 and (other := ignored_settings(config)):
        _log.warning("accelerate launch asks for %s, which only strategy.name=accelerate follows", other)
    device = choose_device(config.run.device, launch, config.run.threads)
    check_device(device, compute=config.precision.compute, compiles=config.memory.compile)
    mesh = config.mesh
    sizes = plan_mesh(launch.world_size, replicate=mesh.replicate, shard=mesh.shard, tensor=mesh.tensor)
    strategy = strategy_class(config.strategy.name)
    strategy.check(config.strategy.options, sizes, device, config.precision)
    batch = config.data.global_batch if config.data is not None else None
    if isinstance(batch, int) and batch < sizes.data_parallel:
        raise ConfigError(
            explain(
                f"data.global_batch={batch} is smaller than the number of data-parallel ranks.",
                f"of {sizes.data_parallel} ranks some would never have a sample",
                f"set data.global_batch to at least {sizes.data_parallel}, or start fewer processes",
            )
        )
    if config.model is not None:
        strategy.check_model(config.strategy.options, sizes, model_factory(config))
    if config.optim is not None:
        make = optimizer_factory_of(config)
        reject_closures(make, "optim.target")
        strategy.check_optimizer(make)
    schedule_factory_of(config, 1)
    for section in ("objective", "data.train", "data.collate"):
        target = attrgetter(section)(config) if section == "objective" or config.data is not None else None
        if target is not None:
            resolve_target(target.target, section=section.split(".")[0], folder=config.folder)
    folder = Path(config.run.dir) / config.run.name
    return Plan(config, launch, device, sizes, strategy, folder, checkpoints_of(config))


def start_world(plan: Plan) -> World:
    """Join the process group and build the mesh. Collective."""
    apply_device(plan.device)
    group = Group(plan.launch, plan.device, timeout_s=plan.config.run.timeout_s)
    mesh = build_mesh(plan.sizes, plan.device.device.type, plan.launch.rank)
    world = World(
        group=group,
        mesh=mesh,
        device=plan.device.device,
        seed=plan.config.run.seed,
        precision=plan.config.precision,
        memory=plan.config.memory,
    )
    _log.info(
        "%s; %s over %s, %d CPU thread(s) per rank, timeout %.0f s",
        plan.launch.described,
        plan.device.device.type,
        plan.device.backend,
        plan.device.threads,
        plan.config.run.timeout_s,
    )
    return world


def model_factory(config: Config) -> Callable[[], nn.Module]:
    """Return the config's model factory. It is a `functools.partial` where possible, which shows the model's class."""
    target = _needed(config.model, "model")
    call = resolve_target(target.target, section="model", folder=config.folder)
    if any(isinstance(value, dict | list) for value in target.args.values()):
        # Nested targets are built at every call, so that their random numbers follow the seed.
        return partial(build_target, target, section="model", folder=config.folder)
    check_arguments(call, (), target.args, what=f"model.target={target.target}")
    return partial(call, **target.args)


def optimizer_factory_of(config: Config) -> MakeOptimizer:
    """Return the factory of the config's optimizer, or of several as one. Vectors get no weight decay by default."""
    optim = _needed(config.optim, "optim")
    if not isinstance(optim, tuple):
        return _one_optimizer(config, optim, "optim")
    keys = [f"optim.{at}" for at in range(len(optim))]
    parts = [Part(_one_optimizer(config, one, key), one.match, key) for one, key in zip(optim, keys, strict=True)]
    return SeveralFactory(tuple(parts))


def _one_optimizer(config: Config, optim: OptimConfig, key: str) -> MakeOptimizer:
    make = resolve_target(optim.target, section="optim", folder=config.folder)
    return optimizer_factory(make, optim.args, no_decay=optim.no_decay, decay_vectors=optim.decay_vectors, key=key)


def schedule_factory_of(config: Config, total_steps: int) -> MakeSchedule | None:
    """Return the factory of the config's schedule, None for a constant rate."""
    if config.schedule is None:
        return None
    make = resolve_target(config.schedule.target, section="schedule", folder=config.folder)
    return schedule_factory(make, config.schedule.args, total_steps=total_steps)


def objective_of(config: Config) -> Objective:
    """Build the config's objective: an instance of a class, or a plain callable `(model, batch)`.

    It is built under the seed, as models are, because it may have parameters.
    """
    target = _needed(config.objective, "objective")
    seed_everything(config.run.seed)
    return Objective(build_callable(target, "objective", config.folder))


def build_callable(target: Target, section: str, folder: Path | None, *, takes: int = 2) -> Any:
    """Build a callable from a target: call a class or factory with its args, or return a plain function.

    A function that can be called with its `args` alone is a factory. A function that needs `takes` more arguments (and
    `context`, if it has that parameter) is the callable itself.
    """
    found = resolve_target(target.target, section=section, folder=folder)
    if not isinstance(found, type):
        try:
            signature = inspect.signature(found)
            known = {"context": None} if "context" in signature.parameters and "context" not in target.args else {}
            signature.bind(*[None] * takes, **known, **target.args)
        except (TypeError, ValueError):
            return build_target(target, section=section, folder=folder)
        try:
            signature.bind(**target.args)
        except TypeError:
            return partial(found, **build_nested(target.args, section=section, folder=folder)) if target.args else found
    return build_target(target, section=section, folder=folder)


def dataset_of(config: Config, target: Target) -> Any:
    """Build the dataset of `target`. Local."""
    return build_target(target, section="data", folder=config.folder)


def total_steps_of(config: Config, *, dataset: Any, global_batch: int | None) -> int | None:
    """Return the run's optimizer steps from run.steps, run.epochs or run.tokens; None where a custom loop decides."""
    run = config.run
    if run.steps is not None:
        return run.steps
    if global_batch is None or dataset is None:
        return None
    if run.tokens is not None:
        return -(-run.tokens // (global_batch * tokens_per_sample(dataset, "run.tokens")))
    if run.epochs is not None:
        if not hasattr(dataset, "__len__"):
            raise ConfigError(
                explain("run.epochs needs the length of an epoch.", "the dataset has no __len__", "set run.steps")
            )
        size, drops = len(dataset), config.data is not None and config.data.last == "drop"
        return run.epochs * (size // global_batch if drops else -(-size // global_batch))
    return None


def samples_of(amount: Any, *, dataset: Any, key: str) -> int:
    """Return `amount` as a number of samples: a number, or `{tokens: n}` over the dataset's `tokens_per_sample`."""
    if isinstance(amount, int):
        return amount
    return max(1, int(amount.tokens) // tokens_per_sample(dataset, key))


def tokens_per_sample(dataset: Any, key: str) -> int:
    """Return the dataset's `tokens_per_sample`. Raises ConfigError where it has none."""
    found = getattr(dataset, "tokens_per_sample", None)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(
            explain(
                f"Cannot convert {key} from tokens.",
                f"{type(dataset).__qualname__} does not state how many tokens a sample has",
                "give the dataset an attribute tokens_per_sample, or set samples and steps instead",
            )
        )
    return int(found)


def _needed(section: Any, name: str) -> Any:
    if section is None:
        raise ConfigError(
            explain(f"The config needs a section {name!r}.", "the section is missing", f"add {name}: {{target: ...}}")
        )
    return section
