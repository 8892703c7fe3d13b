"""Why two runs differ, by trying: what to run again with one thing changed, and what it means if both are equal then.

Owns the list of suspects and what is said of each. Pure: the trials are run elsewhere.
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
"""Relative; float32 sums of one batch and of its parts agree within 1e-6, an average is off by the parts' number."""


@dataclass(frozen=True)
class Cause:
    """What explains a difference, in words for people, and `shown_by`: the trial or measurement that showed it."""

    cause: str
    text: str
    shown_by: str


@dataclass(frozen=True)
class Trial:
    """Both sides again under `overrides` and with `quiet` modules; `alone`, the reference only, and the case as it was.

    Equal then, the difference is explained by `cause`.
    """

    cause: str
    text: str
    shown_by: str
    overrides: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()
    alone: bool = False

    @property
    def found(self) -> Cause:
        """What it means that this trial made both equal."""
        return Cause(self.cause, self.text, self.shown_by)


# ---------------------------------------------------------------------- one process, another micro-batch


def micro_batch_trials(probe: Mapping[str, Any]) -> list[Trial]:
    """For the reference that differs from itself at another micro-batch: the cause is in the model or the objective."""
    dropout = "dropout draws for each micro-batch anew: equal only at the same data.micro_batch"
    norms = probe["batch_norms"]
    statistics = (
        f"batch norm ({_some(norms)}) takes mean and variance of each micro-batch: keep data.micro_batch, "
        "or use a norm of each item (LayerNorm, GroupNorm)"
    )
    trials = []
    if probe["draws"]:
        trials.append(Trial(DROPOUT, dropout, "equal with dropout off", quiet=("dropout",)))
    if norms:
        trials.append(
            Trial(STATISTICS, statistics, "equal with batch norm on its kept statistics", quiet=("batch_norm",))
        )
    if probe["draws"] and norms:
        both = f"{statistics}; and {dropout}"
        trials.append(Trial(STATISTICS, both, "equal with both off", quiet=("dropout", "batch_norm")))
    if not norms:
        what = dropout if probe["draws"] else "the model sees its whole micro-batch, or keeps state, in training mode"
        kind = DROPOUT if probe["draws"] else COUPLED
        trials.append(Trial(kind, what, "equal with the model in evaluation mode", quiet=("everything",)))
    return trials


def objective_cause(probe: Mapping[str, Any]) -> Cause | None:
    """Whether the objective on a batch is the sum of what it says of the batch's parts; where not, how. Measured."""
    if probe["couples_items"]:
        text = (
            "the objective says couples_items: its terms are of a whole micro-batch, so data.micro_batch is its maths"
        )
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
            f"on {sum(found['samples'])} samples it says {total:.6g} of weight {weight:g}, on their parts of {samples} "
            f"{' and '.join(f'{a:.6g} of weight {b:g}' for a, b in zip(totals, weights, strict=True))}"
        )
        if _averages(total, weight, totals, weights):
            text = (
                "the objective averages before it sums: let it return the sum of its items' losses (reduction='sum') "
                "and their number"
            )
            return Cause(OBJECTIVE, text, measured)
        text = (
            "an item's loss depends on the other items of its batch (contrastive, balance): say couples_items = True, "
            "and keep data.micro_batch"
        )
        return Cause(COUPLED, text, measured)
    return None


def _averages(total: float, weight: float, totals: Sequence[float], weights: Sequence[float]) -> bool:
    """An average of a batch lies between those of its parts, however it is weighed."""
    means = [part / (size or 1.0) for part, size in zip(totals, weights, strict=True)]
    mean = total / (weight or 1.0)
    slack = _ADDS_UP * max(map(abs, means))
    inside = min(means) - slack <= mean <= max(means) + slack
    # A mean that claims to weigh its items: the total itself is the average.
    return inside or min(totals) - slack <= total <= max(totals) + slack


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _ADDS_UP * max(abs(a), abs(b), 1e-12)


# ---------------------------------------------------------------------- a strategy against the reference


def case_trials(overrides: Sequence[str], own: Config, case: Config, probe: Mapping[str, Any]) -> list[Trial]:
    """For a case that differs from the reference at its own micro-batch; those that need no world of several first."""
    return [*_settings_of(overrides), *_clips(own), *_both_sides(own, case, probe)]


def _settings_of(overrides: Sequence[str]) -> list[Trial]:
    """What the case itself sets that changes the maths: the reference under it, one by one and together."""
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
    if isinstance(own.optim, tuple):  # which of several says it, an override would have to know
        return []
    clip = own.clip_norm or None
    if not clip:
        return []
    text = f"it does not clip, while optim.clip_norm is {clip:g}"
    return [Trial(CLIP, text, "equal to a reference that does not clip", ("optim.clip_norm=null",), alone=True)]


def clip_left_to_deepspeed(own: Config, case: Config) -> Trial | None:
    """Where a native JSON leaves clipping open: DeepSpeed alone would clip at 1.0, here `optim.clip_norm` decides.

    The trial shows what that would have changed.
    """
    native: Any = getattr(case.strategy.options, "native", None)
    if not isinstance(native, Mapping) or not clip_left_out(native):
        return None
    if own.optim is None or isinstance(own.optim, tuple) or own.clip_norm == 1.0:
        return None
    text = (
        "the native JSON leaves gradient_clipping open: DeepSpeed alone clips at 1.0, its default, and differs from "
        f"every other strategy; here optim.clip_norm decides, which is {own.clip_norm or 'off'}"
    )
    return Trial(CLIP, text, "", ("optim.clip_norm=1.0",), alone=True)


def clip_measured(difference: Difference) -> str:
    """What a clip at 1.0 changes in one process, in words."""
    if difference.equal:
        return "a reference that clips at 1.0 is equal in these steps: no gradient was longer"
    largest = f"parameters by up to {difference.parameters:.1e}, the loss by {difference.loss:.1e}"
    return f"a reference that clips at 1.0 is another from step {difference.first_step} on: {largest}"


def _both_sides(own: Config, case: Config, probe: Mapping[str, Any]) -> list[Trial]:
    trials = []
    if probe["batch_norms"]:
        text = (
            f"batch norm ({_some(probe['batch_norms'])}): each process keeps statistics of its own micro-batches, "
            "one process of all of them"
        )
        trials.append(Trial(STATISTICS, text, "equal with batch norm on its kept statistics", quiet=("batch_norm",)))
    if probe["draws"]:
        text = "what the forward draws (dropout) is not the same"
        trials.append(Trial(DROPOUT, text, "equal with dropout off", quiet=("dropout",)))
    if own.clip_norm and not isinstance(own.optim, tuple):
        text = "clipping: its norm, or its threshold, is another one"
        trials.append(Trial(CLIP, text, "equal with clipping off on both sides", ("optim.clip_norm=null",)))
    if not probe["elementwise"] and isinstance(own.optim, OptimConfig):
        rate = own.optim.args.get("lr")
        lr = rate if isinstance(rate, int | float) else 1e-3
        text = f"{optimizer_text(own)}: cut parameters are other numbers to it"
        swap = ("optim.target=torch.optim.SGD", f"optim.args.lr={lr}")
        trials.append(Trial(OPTIMIZER, text, "equal with torch.optim.SGD on both sides", swap))
    for compute in {own.precision.compute, case.precision.compute} - {"fp32", "fp64"}:
        text = f"precision.compute={compute} rounds otherwise here than in one process"
        trials.append(Trial(DTYPE, text, "equal in fp32 on both sides", FP32))
    return trials


def optimizer_text(own: Config) -> str:
    """What is said of an optimizer that is not elementwise."""
    listed = own.optim if isinstance(own.optim, tuple) else [own.optim]
    targets = [one.target for one in listed if one is not None]
    names = [one if isinstance(one, str) else getattr(one, "__qualname__", str(one)) for one in targets]
    return f"{' or '.join(names)} is not elementwise, it looks at whole parameters"


def unexplained(probe: Mapping[str, Any]) -> Cause:
    """Nothing tried made both equal; what is known to be possible is named."""
    hints = []
    if probe["stream"]:
        hints.append("the data are a stream, which processes may cut into other batches")
    if probe["changing_buffers"]:
        hints.append(f"a forward changes the model's state ({_some(probe['changing_buffers'])})")
    text = "; ".join(hints) or "none of the known causes: try --steps 1 and precision.compute=fp64"
    return Cause(UNKNOWN, text, "no trial made both equal")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
