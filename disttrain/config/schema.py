"""What a config may say: one frozen class a section, unknown keys refused. Imports no torch.

Owns types, defaults and what one value may be; `rules` has what several keys must be together.
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
    """A short name known to the section, an import path, or (from Python) a callable; `args` are passed to it."""

    target: str | Callable[..., Any]
    args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("target")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("an empty text; name a part, or write package.module:attribute")
        return value


class TokenCount(Section):
    """A number of tokens, for data that says how many a sample has."""

    tokens: int = Positive


class RunConfig(Section):
    """Which run this is, how long, on what. Exactly one of steps, epochs, tokens (own loops may leave all out)."""

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
            raise ValueError("no folder's name; write one name without a slash, and the rest in run.dir")
        return value


class ModelConfig(Target):
    """`weights` is a run, a checkpoint or a file or folder of weights to start from; without `weights_strict` names may
    be missing there, or more than the model's. With `sync_batch_norm` batch norms take their statistics over the
    micro-batches of all ranks."""

    weights: str | None = None
    weights_strict: bool = True
    sync_batch_norm: bool = False


class DataConfig(Section):
    """`global_batch` defines the maths, `micro_batch` memory and speed. `last` is an epoch's last, smaller batch."""

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
            raise ValueError("no batch; write at least 1 sample, or {tokens: n}")
        return value


class EvalConfig(Section):
    """`every` steps, and at the end, over each of `sets`."""

    every: int | None = Field(None, gt=0)
    at_end: bool = True
    micro_batch: int | None = Field(None, gt=0)
    sets: dict[str, Target] = Field(default_factory=dict)


class OptimConfig(Target):
    """`clip_norm` null or 0 is off. Vectors get no weight decay unless `decay_vectors`; `no_decay` adds patterns."""

    clip_norm: float | None = Field(None, ge=0)
    no_decay: tuple[str, ...] = ()
    decay_vectors: bool = False


class MatchedOptimConfig(OptimConfig):
    """One of several optimizers: of the parameters whose names `match` (a pattern or a list of them) and that none
    before it took. `clip_norm` is that of the step, over all parameters: one of the list says it for all."""

    match: tuple[str, ...]

    @field_validator("match", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        if value in ("", []):
            raise ValueError("no pattern; write one or a list of them, '*' for every parameter that is left")
        return [value] if isinstance(value, str) else value


class MeshConfig(Section):
    """Degrees that multiply to the world size; -1 is what is left."""

    replicate: int = 1
    shard: int = -1
    tensor: int = 1

    @field_validator("replicate", "shard", "tensor")
    @classmethod
    def _degree(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("no degree; write a positive number, or -1 for what is left")
        return value


class StrategyConfig(Section):
    """`name` chooses; every strategy's options may stand beside it, so that switching is one line."""

    model_config = ConfigDict(extra="allow")

    name: str = "ddp"
    none: NoneOptions = NoneOptions()
    ddp: DDPOptions = DDPOptions()
    fsdp: FSDPOptions = FSDPOptions()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()

    @model_validator(mode="before")
    @classmethod
    def _plug_in_stated(cls, values: Any) -> Any:
        """A plug-in's options are in the resolved config whole, as the built-in ones' are."""
        name = values.get("name") if isinstance(values, Mapping) else None
        if not isinstance(name, str) or name in cls.model_fields:
            return values
        try:
            options = strategy_entry(name).options.model_validate(values.get(name) or {})
        except (UnknownNameError, ValidationError):  # told by `validate`, with their lines
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
    """`compute` is the type of matrix products, by autocast where parameters are wider. `master` is that of parameters
    and optimizer state, `reduce` that in which gradients are added up over ranks; left out, fp32 (fp64 under fp64).
    bf16 with `master: bf16` is pure. fp16 scales its loss, and skips a step whose gradient overflows."""

    compute: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    master: Literal["fp32", "fp64", "bf16"]
    reduce: Literal["fp32", "fp64", "bf16"]

    @model_validator(mode="before")
    @classmethod
    def _stated(cls, values: Any) -> Any:
        """What was left out is stated in the resolved config."""
        if not isinstance(values, Mapping):
            return values
        wide = "fp64" if values.get("compute") == "fp64" else "fp32"
        return {**values, "master": values.get("master") or wide, "reduce": values.get("reduce") or wide}


class MemoryConfig(Section):
    """What is paid to save memory, in every strategy. `recompute` runs forwards again in the backward: of whole blocks
    (`full`), of all but what costly operations gave (`selective`), or as much as `budget` (a share of the activations,
    under compile) asks for. `compile` compiles each block in place. `blocks` names classes or module patterns; left
    out, blocks are the repeated parts."""

    recompute: Literal["none", "full", "selective", "budget"] = "none"
    budget: float = Field(0.5, ge=0, le=1)
    compile: bool = False
    blocks: tuple[str, ...] | None = None


class BestConfig(Section):
    """Also keep the `keep` checkpoints with the least (`mode` min) or greatest (max) `metric`, as `eval/SET/NAME`: of
    those saved on a step that was evaluated."""

    metric: str
    mode: Literal["min", "max"] = "min"
    keep: int = Field(1, gt=0)


class CheckpointConfig(Section):
    """Saved `every` steps and at the end, in the `background` if wanted: training then waits for a copy in host memory
    alone. Kept are the newest `keep_last`, those of steps that `keep_every` divides, and the `best`. `only: trainable`
    leaves frozen parameters out. Where a save fails the run may stop, retry (three times) or go_on without it.
    `resume` is auto, never, or the path of a run or checkpoint to start from. `storage` is an address such as
    s3://bucket/prefix, or a folder: checkpoints then lie in its RUN_NAME instead of in the run's folder."""

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
    """`every` steps; `trackers` are names or targets."""

    every: int = Field(10, gt=0)
    trackers: tuple[Target, ...] = ()
    progress: bool = True
    plot: bool = True

    @field_validator("trackers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [{"target": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class Config(Section):
    """A whole config. `sources` says where each value came from, by dotted key; `folder` is the file's."""

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
        """Where import paths resolve first."""
        return self._folder

    @property
    def clip_norm(self) -> float | None:
        """That of the step, over the gradients of all optimizers."""
        several = self.optim if isinstance(self.optim, tuple) else [self.optim]
        return next((one.clip_norm for one in several if one is not None and one.clip_norm is not None), None)

    def placed(self, sources: Mapping[str, str], folder: Path) -> Config:
        """The same config, knowing where its values come from. For `load_config`."""
        found = self.model_copy()
        found._sources, found._folder = dict(sources), folder
        return found

    def to_dict(self, *, redact: bool = True) -> dict[str, Any]:
        """Resolved values as JSON; callables as `module:qualname`, secrets redacted."""
        found: dict[str, Any] = plain(self.values(), redact=redact)
        return found

    def values(self) -> dict[str, Any]:
        """Resolved values with Python's own objects in them as they are; sections as mappings."""
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
