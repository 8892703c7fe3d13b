"""Defines the trials that explain a difference: what to change, and what it means if both sides are then equal.

Pure: `runs` executes the trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config import Config
from disttrain.config.foreign.deepspeed_native import clip_left_out
from disttrain.config.schema import OptimConfig
from disttrain.parity.compare import Difference

CLIP, DTYPE, DROPOUT, STATISTICS = "clip", "dtype", "dropout", "batch_statistics"
OPTIMIZER, OBJECTIVE, COUPLED, SETTING, UNKNOWN = "optimizer", "objective", "couples_items", "setting", "unknown"

FP32 = ("precision.compute=fp32", "precision.master=null", "precision.reduce=null")
_SAME_MATHS = ("strategy.", "mesh.", "memory.", "run.threads", "data.micro_batch", "data.workers", "data.prefetch")
_OF_KEY = (("optim.clip_norm", CLIP), ("precision.", DTYPE), ("optim.", OPTIMIZER))
_ADDS_UP = 1e-4
"""Relative. float32 sums of a batch and of its parts agree within 1e-6; an average is off by the number of parts."""


@dataclass(frozen=True)
class Cause:
    """The explanation of a difference. `shown_by` names the trial or measurement that showed it."""

    cause: str
    text: str
    shown_by: str


@dataclass(frozen=True)
class Trial:
    """Runs both sides again under `overrides`, with the `evaluated` kinds of modules in evaluation mode.

    With `alone`, only the reference runs again. If both sides are then equal, `cause` explains the difference.
    """

    cause: str
    text: str
    shown_by: str
    overrides: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()
    alone: bool = False

    @property
    def found(self) -> Cause:
        """The cause that this trial shows if it makes both sides equal."""
        return Cause(self.cause, self.text, self.shown_by)


# ---------------------------------------------------------------------- one process, another micro-batch


def micro_batch_trials(probe: Mapping[str, Any]) -> list[Trial]:
    """Returns trials for a reference that differs at another micro-batch, because of its model or objective."""
    dropout = "dropout draws new random numbers for each micro-batch: equal only at the same data.micro_batch"
    norms = probe["batch_norms"]
    statistics = (
        f"batch norm ({_some(norms)}) takes mean and variance of each micro-batch: keep data.micro_batch, "
        "or use a norm per item (LayerNorm, GroupNorm)"
    )
    trials = []
    if probe["draws"]:
        trials.append(Trial(DROPOUT, dropout, "equal with dropout off", evaluated=("dropout",)))
    if norms:
        trials.append(
            Trial(STATISTICS, statistics, "equal with batch norm on its kept statistics", evaluated=("batch_norm",))
        )
    if probe["draws"] and norms:
        both = f"{statistics}; and {dropout}"
        trials.append(Trial(STATISTICS, both, "equal with both off", evaluated=("dropout", "batch_norm")))
    if not norms:
        what = dropout if probe["draws"] else "in training mode the model mixes a batch's items, or keeps state"
        kind = DROPOUT if probe["draws"] else COUPLED
        trials.append(Trial(kind, what, "equal with the model in evaluation mode", evaluated=("everything",)))
    return trials


def objective_cause(probe: Mapping[str, Any]) -> Cause | None:
    """Returns a cause if the objective of a batch is not the sum of the objectives of its parts, else None."""
    if probe["couples_items"]:
        text = "the objective sets couples_items: its terms depend on the other items, so data.micro_batch matters"
        return Cause(COUPLED, text, "its attribute couples_items")
    found = probe["objective"]
    if found is None:
        return None
    for term, (total, weight) in enumerate(zip(found["total"], found["weight"], strict=True)):
        totals = [part[term] for part in found["part_totals"]]
        weights = [part[term] for part in found["part_weights"]]
        if _close(total, sum(totals)) and _close(weight, sum(weights)):
            continue
        samples = " and ".join(map(str, found["samples"]))
        measured = (
            f"on {sum(found['samples'])} samples it returns {total:.6g} of weight {weight:g}, on parts of {samples} "
            f"{' and '.join(f'{a:.6g} of weight {b:g}' for a, b in zip(totals, weights, strict=True))}"
        )
        if _averages(total, weight, totals, weights):
            text = (
                "the objective averages before it sums: return the sum of the items' losses (reduction='sum') "
                "and their number"
            )
            return Cause(OBJECTIVE, text, measured)
        text = (
            "an item's loss depends on the other items of its batch (contrastive, load balance): "
            "set couples_items = True and keep data.micro_batch"
        )
        return Cause(COUPLED, text, measured)
    return None


def _averages(total: float, weight: float, totals: Sequence[float], weights: Sequence[float]) -> bool:
    """Returns whether the total behaves as an average: between the averages of the parts, whatever their weights."""
    means = [part / (size or 1.0) for part, size in zip(totals, weights, strict=True)]
    mean = total / (weight or 1.0)
    slack = _ADDS_UP * max(map(abs, means))
    inside = min(means) - slack <= mean <= max(means) + slack
    # An objective that returns a mean with a weight: the total itself is the average.
    return inside or min(totals) - slack <= total <= max(totals) + slack


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _ADDS_UP * max(abs(a), abs(b), 1e-12)


# ---------------------------------------------------------------------- a strategy against the reference


def case_trials(overrides: Sequence[str], own: Config, case: Config, probe: Mapping[str, Any]) -> list[Trial]:
    """Returns trials for a variant that differs from the reference. Trials on one process come first."""
    return [*_settings_of(overrides), *_clips(own), *_both_sides(own, case, probe)]


def _settings_of(overrides: Sequence[str]) -> list[Trial]:
    """Tries the reference under the variant's settings that change the mathematics, one by one and together."""
    found = [one for one in overrides if not one.startswith(_SAME_MATHS)]
    trials = []
    for one in found:
        cause = next((cause for key, cause in _OF_KEY if one.startswith(key)), SETTING)
        trials.append(Trial(cause, f"the case sets {one}", f"equal to a reference under {one}", (one,), alone=True))
    if len(found) > 1:
        text = f"the case sets {', '.join(found)}"
        trials.append(Trial(SETTING, text, "equal to a reference under all of them", tuple(found), alone=True))
    return trials


def _clips(own: Config) -> list[Trial]:
    if isinstance(own.optim, tuple):  # an override would have to name one optimizer of several
        return []
    clip = own.clip_norm or None
    if not clip:
        return []
    text = f"the run does not clip, although optim.clip_norm is {clip:g}"
    return [Trial(CLIP, text, "equal to a reference that does not clip", ("optim.clip_norm=null",), alone=True)]


def clip_left_to_deepspeed(own: Config, case: Config) -> Trial | None:
    """Returns a trial that measures DeepSpeed's default clipping, if a native JSON does not set `gradient_clipping`.

    DeepSpeed alone would clip at 1.0; here `optim.clip_norm` decides.
    """
    native: Any = getattr(case.strategy.options, "native", None)
    if not isinstance(native, Mapping) or not clip_left_out(native):
        return None
    if own.optim is None or isinstance(own.optim, tuple) or own.clip_norm == 1.0:
        return None
    text = (
        "the native JSON does not set gradient_clipping: DeepSpeed alone clips at 1.0, its default, unlike every other "
        f"strategy; here optim.clip_norm decides, which is {own.clip_norm or 'off'}"
    )
    return Trial(CLIP, text, "", ("optim.clip_norm=1.0",), alone=True)


def clip_measured(difference: Difference) -> str:
    """Describes what clipping at 1.0 changes in one process."""
    if difference.equal:
        return "a reference that clips at 1.0 is equal in these steps: no gradient norm exceeded it"
    largest = f"parameters by up to {difference.parameters:.1e}, the loss by {difference.loss:.1e}"
    return f"a reference that clips at 1.0 differs from step {difference.first_step} on: {largest}"


def _both_sides(own: Config, case: Config, probe: Mapping[str, Any]) -> list[Trial]:
    trials = []
    if probe["batch_norms"]:
        text = (
            f"batch norm ({_some(probe['batch_norms'])}): each rank keeps statistics of its micro-batches, "
            "one process keeps statistics of all"
        )
        trials.append(
            Trial(STATISTICS, text, "equal with batch norm on its kept statistics", evaluated=("batch_norm",))
        )
    if probe["draws"]:
        text = "the random numbers of the forward (dropout) differ"
        trials.append(Trial(DROPOUT, text, "equal with dropout off", evaluated=("dropout",)))
    if own.clip_norm and not isinstance(own.optim, tuple):
        text = "clipping uses another norm or threshold"
        trials.append(Trial(CLIP, text, "equal with clipping off on both sides", ("optim.clip_norm=null",)))
    if not probe["elementwise"] and isinstance(own.optim, OptimConfig):
        rate = own.optim.args.get("lr")
        lr = rate if isinstance(rate, int | float) else 1e-3
        text = f"{optimizer_text(own)}: it computes another update on shards"
        swap = ("optim.target=torch.optim.SGD", f"optim.args.lr={lr}")
        trials.append(Trial(OPTIMIZER, text, "equal with torch.optim.SGD on both sides", swap))
    for compute in {own.precision.compute, case.precision.compute} - {"fp32", "fp64"}:
        text = f"precision.compute={compute} rounds differently here than in one process"
        trials.append(Trial(DTYPE, text, "equal in fp32 on both sides", FP32))
    return trials


def optimizer_text(own: Config) -> str:
    """Names the optimizers that are not elementwise."""
    listed = own.optim if isinstance(own.optim, tuple) else [own.optim]
    targets = [one.target for one in listed if one is not None]
    names = [one if isinstance(one, str) else getattr(one, "__qualname__", str(one)) for one in targets]
    return f"{' or '.join(names)} is not elementwise, it needs complete parameters"


def unexplained(probe: Mapping[str, Any]) -> Cause:
    """Returns the cause of a difference that no trial explained, with possible reasons."""
    hints = []
    if probe["stream"]:
        hints.append("the data are a stream, which ranks may split into other batches")
    if probe["changing_buffers"]:
        hints.append(f"a forward changes the model's state ({_some(probe['changing_buffers'])})")
    text = "; ".join(hints) or "none of the known causes: try --steps 1 and precision.compute=fp64"
    return Cause(UNKNOWN, text, "no trial made both equal")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
