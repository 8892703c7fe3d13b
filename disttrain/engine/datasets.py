"""Keeps the datasets of a run by name, makes batches from them, and moves micro-batches to the device.

Rejects two datasets of one name, and batches that cannot be spread over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from disttrain.config import Config
from disttrain.data import Batches, MicroBatch
from disttrain.engine import build
from disttrain.errors import ConfigError, explain
from disttrain.strategy import World
from disttrain.torch_internals import map_tensors

TRAIN = "train"


class Datasets:
    """The config's datasets and those passed to `engine.batches`. Collective where a dataset is built."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._known: dict[str, Any] = {}
        self.total_steps: int | None = config.run.steps
        """Optimizer steps of the run; None where a custom loop decides, or before the training data are known."""

    def train(self) -> Any:
        """Return the dataset of `data.train`, built once; None without a section `data`."""
        data = self._config.data
        if data is not None and TRAIN not in self._known:
            made = self._world.group.together(lambda: build.dataset_of(self._config, data.train), "building data.train")
            self._adopt(TRAIN, made, build.samples_of(data.global_batch, dataset=made, key="data.global_batch"))
        return self._known.get(TRAIN)

    def batches(
        self, name: str, dataset: Any, global_batch: int | None, micro_batch: int | None, options: Mapping[str, Any]
    ) -> Batches:
        """Return this rank's batches of a dataset. Dataset, sizes and options default to the config's."""
        if dataset is None:
            dataset = self.train()
        if dataset is None:
            raise ConfigError(
                explain("engine.batches has no dataset.", "the config has no section data", "add it, or pass a dataset")
            )
        sizes = self._sizes(dataset, global_batch, micro_batch)
        self._adopt(name, dataset, sizes[0])
        settings = {**self._settings(), **options}
        return self._world.group.together(
            lambda: Batches(
                dataset,
                seed=self._config.run.seed,
                global_batch=sizes[0],
                micro_batch=sizes[1],
                part=self._world.mesh.part,
                agree=self._world.group.minimum,
                **settings,
            ),
            "preparing the data",
        )

    def tokens_per_sample(self, name: str) -> int:
        """Return the dataset's `tokens_per_sample`, 0 where it has none. Local."""
        return int(getattr(self._known[name], "tokens_per_sample", 0) or 0)

    @cached_property
    def evaluation_sets(self) -> dict[str, Any]:
        """The config's evaluation sets by name, built once. Local."""
        sets = self._config.eval.sets if self._config.eval else {}
        return {name: build.dataset_of(self._config, target) for name, target in sets.items()}

    def evaluation_micro_batch(self) -> int:
        """Return the samples of one evaluation batch: `eval.micro_batch`, else that of training.

        Local once the training data are built.
        """
        if self._config.eval is not None and self._config.eval.micro_batch is not None:
            return self._config.eval.micro_batch
        return self._sizes(self.train(), None, None)[1] if self._config.data is not None else 1

    def collate(self) -> Any:
        """Return the config's collate function, None where it names none. Local."""
        target = self._config.data.collate if self._config.data is not None else None
        return build.build_callable(target, "data", self._config.folder, takes=1) if target is not None else None

    def _adopt(self, name: str, dataset: Any, global_batch: int) -> None:
        if self._known.setdefault(name, dataset) is not dataset:
            raise ConfigError(
                explain(
                    f"engine.batches cannot use the name {name!r} for this dataset.",
                    "another dataset has that name",
                    "pass a different name= for each dataset",
                )
            )
        if name == TRAIN and self.total_steps is None:
            self.total_steps = build.total_steps_of(self._config, dataset=dataset, global_batch=global_batch)

    def _sizes(self, dataset: Any, global_batch: int | None, micro_batch: int | None) -> tuple[int, int]:
        """Return the samples of a step over all ranks, and of a micro-batch."""
        data, parts = self._config.data, self._world.mesh.part[1]
        if global_batch is None and data is not None:
            global_batch = build.samples_of(data.global_batch, dataset=dataset, key="data.global_batch")
        if micro_batch is None and data is not None and data.micro_batch is not None:
            micro_batch = build.samples_of(data.micro_batch, dataset=dataset, key="data.micro_batch")
        if global_batch is None:
            raise ConfigError(
                explain(
                    "engine.batches needs a global batch.",
                    "neither global_batch= nor data.global_batch is set",
                    "set one of them",
                )
            )
        if global_batch < parts:
            raise ConfigError(
                explain(
                    f"A global batch of {global_batch} is smaller than the number of data-parallel ranks.",
                    f"there are {parts} of them",
                    "enlarge the global batch, or start fewer processes",
                )
            )
        return global_batch, min(micro_batch or -(-global_batch // parts), global_batch)

    def _settings(self) -> dict[str, Any]:
        data = self._config.data
        if data is None:
            return {}
        names = ("shuffle", "last", "workers", "prefetch", "on_resume")
        return {**{name: getattr(data, name) for name in names}, "collate": self.collate()}


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the micro-batch with every tensor in lists, tuples and mappings on `device`. Local.

    Does not wait for the copy. A micro-batch that needs no copy is returned unchanged.
    """
    if device.type == "cpu":
        return micro
    moved = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), micro.batch)
    return replace(micro, batch=moved)
