"""Defines the schema of a config: one frozen class for each section, without unknown keys. Imports no torch.

The classes have the types, the defaults and the allowed values of single keys. `rules` has the rules over several keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from disttrain.config.problems import UnknownNameError
from disttrain.config.section import Section
from disttrain.config.strategy_options import DDPOptions, DeepSpeedOptions, FSDPOptions, NoneOptions, strategy_entry
from disttrain.config.values import plain

Positive = Field(gt=0)


class Target(Section):
    """A short name of the section, an import path or, from Python, a callable. `args` are passed to the callable."""

    target: str | Callable[..., Any]
    args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("target")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("an empty string; write a short name or package.module:attribute")
        return value


class TokenCount(Section):
    """A number of tokens, for datasets that report how many tokens each sample has."""

    tokens: int = Positive


class RunConfig(Section):
    """The run's name and folder, its length and its device.

    Set exactly one of steps, epochs and tokens. A custom loop may leave out all three."""

    name: str = "run"
    dir: str = "runs"
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, gt=0)
    epochs: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0)
    timeout_s: float = Field(1800.0, gt=0)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not value or "/" in value or value in (".", ".."):
            raise ValueError("not the name of a folder; write one name without a slash, and the path in run.dir")
        return value


class ModelConfig(Target):
    """The model. `weights` is the initial weights: a run, a checkpoint, or a file or folder of weights. With
    `weights_strict: false`, names may be missing there or in the model. `sync_batch_norm` computes the statistics of
    batch norms over the micro-batches of all ranks."""

    weights: str | None = None
    weights_strict: bool = True
    sync_batch_norm: bool = False


class DataConfig(Section):
    """The dataset and its batches. `global_batch` determines the arithmetic, `micro_batch` memory and speed. `last`
    says whether an epoch's last, smaller batch is used."""

    train: Target
    collate: Target | None = None
    global_batch: int | TokenCount
    micro_batch: int | TokenCount | None = None
    workers: int = Field(0, ge=0)
    prefetch: int = Field(2, gt=0)
    shuffle: bool = True
    last: Literal["short", "drop"] = "short"
    on_resume: Literal["exact", "replay"] = "exact"

    @field_validator("global_batch", "micro_batch")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("not a batch size; write at least 1 sample, or {tokens: n}")
        return value


class EvalConfig(Section):
    """Evaluation on each of `sets`, `every` so many steps and, with `at_end`, at the end."""

    every: int | None = Field(None, gt=0)
    at_end: bool = True
    micro_batch: int | None = Field(None, gt=0)
    sets: dict[str, Target] = Field(default_factory=dict)


class OptimConfig(Target):
    """The optimizer. `clip_norm` null or 0 turns clipping off. Vectors get weight decay only with `decay_vectors`.
    `no_decay` has patterns of further parameter names without it."""

    clip_norm: float | None = Field(None, ge=0)
    no_decay: tuple[str, ...] = ()
    decay_vectors: bool = False


class MatchedOptimConfig(OptimConfig):
    """An optimizer among several. It steps the parameters whose names `match` a pattern, or one of a list of patterns,
    and that no earlier optimizer steps. `clip_norm` applies to all parameters: state it in one item of the list."""

    match: tuple[str, ...]

    @field_validator("match", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        if value in ("", []):
            raise ValueError("no pattern; write a pattern or a list of patterns, '*' for all remaining parameters")
        return [value] if isinstance(value, str) else value


class MeshConfig(Section):
    """The mesh's degrees, whose product is the number of ranks. -1 stands for the remaining ranks."""

    replicate: int = 1
    shard: int = -1
    tensor: int = 1

    @field_validator("replicate", "shard", "tensor")
    @classmethod
    def _degree(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("not a degree; write a positive number, or -1 for the remaining ranks")
        return value


class StrategyConfig(Section):
    """`name` selects the strategy. The options of other strategies may stay, so that one line switches."""

    model_config = ConfigDict(extra="allow")

    name: str = "ddp"
    none: NoneOptions = NoneOptions()
    ddp: DDPOptions = DDPOptions()
    fsdp: FSDPOptions = FSDPOptions()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()

    @model_validator(mode="before")
    @classmethod
    def _plug_in_stated(cls, values: Any) -> Any:
        """Add the defaults of a plug-in's options, as for built-in strategies, so that the resolved config has them."""
        name = values.get("name") if isinstance(values, Mapping) else None
        if not isinstance(name, str) or name in cls.model_fields:
            return values
        try:
            options = strategy_entry(name).options.model_validate(values.get(name) or {})
        except (UnknownNameError, ValidationError):  # `validate` reports them with their lines
            return values
        return {**values, name: options.model_dump()}

    @property
    def options(self) -> BaseModel:
        """The named strategy's validated options."""
        options = getattr(self, self.name, None)
        if isinstance(options, BaseModel):
            return options
        return strategy_entry(self.name).options.model_validate(options or {})


class PrecisionConfig(Section):
    """`compute` is the dtype of matrix products, by autocast where parameters are wider. `master` is the dtype of
    parameters and optimizer state, and `reduce` the dtype in which gradients are summed over ranks. Both default to
    fp32, or fp64 under fp64. bf16 with `master: bf16` is pure bf16. fp16 scales the loss, and skips a step whose
    gradient overflows."""

    compute: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    master: Literal["fp32", "fp64", "bf16"]
    reduce: Literal["fp32", "fp64", "bf16"]

    @model_validator(mode="before")
    @classmethod
    def _stated(cls, values: Any) -> Any:
        """Add the defaults, so that the resolved config has them."""
        if not isinstance(values, Mapping):
            return values
        wide = "fp64" if values.get("compute") == "fp64" else "fp32"
        return {**values, "master": values.get("master") or wide, "reduce": values.get("reduce") or wide}


class MemoryConfig(Section):
    """Memory savings, for every strategy. `recompute` runs forwards again in the backward: of complete blocks (`full`),
    of all but costly operations (`selective`), or as needed to keep the share `budget` of the activations (`budget`,
    with `compile`). `compile` compiles each block in place. `blocks` lists classes or module patterns; by default,
    blocks are the repeated modules."""

    recompute: Literal["none", "full", "selective", "budget"] = "none"
    budget: float = Field(0.5, ge=0, le=1)
    compile: bool = False
    blocks: tuple[str, ...] | None = None


class BestConfig(Section):
    """Also keep the `keep` checkpoints with the smallest (`mode: min`) or largest (`max`) `metric`, written as
    eval/SET/NAME, of those saved at an evaluated step."""

    metric: str
    mode: Literal["min", "max"] = "min"
    keep: int = Field(1, gt=0)


class CheckpointConfig(Section):
    """Checkpoints are saved `every` so many steps and at the end. With `background`, training waits only for a copy in
    host memory. The newest `keep_last` are kept, those of steps that `keep_every` divides, and the `best`.
    `only: trainable` leaves out frozen parameters. If a save fails, the run stops, retries three times, or continues
    without the checkpoint (`go_on`). `resume` is auto, never, or the path of a run or checkpoint to start from.
    `storage` is a folder or an address such as s3://bucket/prefix: checkpoints are then in its RUN_NAME instead of the
    run's folder."""

    storage: str | None = None
    every: int | None = Field(None, gt=0)
    background: bool = False
    keep_last: int = Field(2, gt=0)
    keep_every: int | None = Field(None, gt=0)
    best: BestConfig | None = None
    only: Literal["all", "trainable"] = "all"
    on_failure: Literal["stop", "retry", "go_on"] = "stop"
    resume: str = "auto"
    at_end: bool = True


class ReportConfig(Section):
    """Reports `every` so many steps. `trackers` are short names or targets."""

    every: int = Field(10, gt=0)
    trackers: tuple[Target, ...] = ()
    progress: bool = True
    plot: bool = True

    @field_validator("trackers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [{"target": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class Config(Section):
    """A validated config. `sources` has the source of each value by dotted key; `folder` is the file's folder."""

    version: Literal[1] = 1
    run: RunConfig = RunConfig()
    model: ModelConfig | None = None
    objective: Target | None = None
    data: DataConfig | None = None
    eval: EvalConfig | None = None
    optim: OptimConfig | tuple[MatchedOptimConfig, ...] | None = None
    schedule: Target | None = None
    mesh: MeshConfig = MeshConfig()
    strategy: StrategyConfig = StrategyConfig()
    precision: PrecisionConfig = PrecisionConfig.model_validate({})
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted key to `file:line`, `override`, `argument` or `default`."""
        return MappingProxyType(self._sources)

    @property
    def folder(self) -> Path:
        """The first folder that import paths resolve from."""
        return self._folder

    @property
    def clip_norm(self) -> float | None:
        """The norm at which a step clips the gradients of all optimizers together, or None."""
        several = self.optim if isinstance(self.optim, tuple) else [self.optim]
        return next((one.clip_norm for one in several if one is not None and one.clip_norm is not None), None)

    def placed(self, sources: Mapping[str, str], folder: Path) -> Config:
        """A copy of the config with the sources of its values. Called by `validate`."""
        found = self.model_copy()
        found._sources, found._folder = dict(sources), folder
        return found

    def to_dict(self, *, redact: bool = True) -> dict[str, Any]:
        """Resolved values as JSON: callables as `module:qualname`, secrets redacted."""
        found: dict[str, Any] = plain(self.values(), redact=redact)
        return found

    def values(self) -> dict[str, Any]:
        """Resolved values: sections as mappings, callables and other Python objects unchanged."""
        found: dict[str, Any] = _values(self)
        return found


def _values(value: Any) -> Any:
    if isinstance(value, Section):
        names = [*type(value).model_fields, *(value.model_extra or {})]
        return {name: _values(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_values(item) for item in value]
    if isinstance(value, dict) and all(isinstance(item, Section) for item in value.values()):
        return {name: _values(item) for name, item in value.items()}
    return value
