"""The datasets of a run, by name: built from the config or given by a script, how they are batched, how long that is.

Refuses two datasets under one name, and batches that cannot be spread over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from disttrain.config import Config
from disttrain.data import Batches
from disttrain.engine import build
from disttrain.errors import ConfigError, explain
from disttrain.strategy import World

TRAIN = "train"


class Datasets:
    """Knows the config's datasets and those that `batches` was given. Collective where a dataset is built."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._known: dict[str, Any] = {}
        self.total_steps: int | None = config.run.steps
        """Optimizer steps of the whole run; None where an own loop decides, or before the training data are known."""

    def train(self) -> Any:
        """The dataset that `data.train` makes, built once; None without such a section."""
        data = self._config.data
        if data is not None and TRAIN not in self._known:
            made = self._world.group.together(lambda: build.dataset_of(self._config, data.train), "building data.train")
            self._adopt(TRAIN, made, build.samples_of(data.global_batch, dataset=made, key="data.global_batch"))
        return self._known.get(TRAIN)

    def batches(
        self, name: str, dataset: Any, global_batch: int | None, micro_batch: int | None, options: Mapping[str, Any]
    ) -> Batches:
        """This rank's batches of `dataset`, or of the config's; sizes and settings are the config's where not given."""
        if dataset is None:
            dataset = self.train()
        if dataset is None:
            raise ConfigError(explain("batches() of the config's data.train", "no section data", "add it, or pass one"))
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
        """The dataset's own word for it, 0 where it has none. Local."""
        return int(getattr(self._known[name], "tokens_per_sample", 0) or 0)

    @cached_property
    def evaluation_sets(self) -> dict[str, Any]:
        """The config's evaluation sets, built once. Local."""
        sets = self._config.eval.sets if self._config.eval else {}
        return {name: build.dataset_of(self._config, target) for name, target in sets.items()}

    def evaluation_micro_batch(self) -> int:
        """Samples that a rank evaluates at once: `eval.micro_batch`, else the training's. Local once data are built."""
        if self._config.eval is not None and self._config.eval.micro_batch is not None:
            return self._config.eval.micro_batch
        return self._sizes(self.train(), None, None)[1] if self._config.data is not None else 1

    def collate(self) -> Any:
        """The config's collate function, if it names one. Local."""
        target = self._config.data.collate if self._config.data is not None else None
        return build.build_callable(target, "data", self._config.folder, takes=1) if target is not None else None

    def _adopt(self, name: str, dataset: Any, global_batch: int) -> None:
        if self._known.setdefault(name, dataset) is not dataset:
            found = "another dataset under that name"
            raise ConfigError(explain(f"batches(name={name!r})", found, "pass name=, one for each dataset"))
        if name == TRAIN and self.total_steps is None:
            self.total_steps = build.total_steps_of(self._config, dataset=dataset, global_batch=global_batch)

    def _sizes(self, dataset: Any, global_batch: int | None, micro_batch: int | None) -> tuple[int, int]:
        """Samples of a step over all ranks, and of a micro-batch."""
        data, parts = self._config.data, self._world.mesh.part[1]
        if global_batch is None and data is not None:
            global_batch = build.samples_of(data.global_batch, dataset=dataset, key="data.global_batch")
        if micro_batch is None and data is not None and data.micro_batch is not None:
            micro_batch = build.samples_of(data.micro_batch, dataset=dataset, key="data.micro_batch")
        if global_batch is None:
            raise ConfigError(explain("A global batch.", "none", "pass global_batch= or set data.global_batch"))
        if global_batch < parts:
            raise ConfigError(
                explain(
                    f"A global batch of {global_batch} is to be spread over the data-parallel ranks.",
                    f"{parts} of them",
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
