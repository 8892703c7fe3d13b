"""The result of `disttrain parity` as values for programs. Pure.

`disttrain parity --json` prints one object:
`equal` (whether the exit code is 0), `exit_code`, `steps`, `micro_batch` and `global_batch` (of the reference, in
samples), `bounds` {loss, grad_norm, parameters}: relative;
`reference` {kind: `plain loop` or `strategy none`, loss: [...], grad_norm: [...]}: by step;
`model` {draws, batch_norms, changing_buffers, couples_items, elementwise, stream}: measured properties;
`note`: a defect of the objective, or null;
`cases`, each {name, world_size, micro_batch, overrides, verdict, loss, grad_norm, parameters (largest relative
differences over the steps, or null), first_step, first_in, tensors and undetermined (each {name, step,
relative, undetermined, entries}), missing, causes (each {cause, text, shown_by}), error {exit_code, text} or null}.

Verdicts: `equal`; `draws` (at another micro-batch dropout draws other random numbers, as documented); `differs`;
`rejected` (before training, by exit code 2 or 3); `failed`; `skipped` (too few GPUs). An `equal` case has a cause if a
setting changed nothing here but would elsewhere (clipping left to DeepSpeed).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from disttrain.errors import FINISHED, TrainingError
from disttrain.parity.causes import Cause
from disttrain.parity.compare import Bounds, Difference
from disttrain.parity.recorded import Recorded
from disttrain.parity.worlds import Failed


@dataclass(frozen=True)
class Row:
    """One variant, or the reference at another micro-batch, with its verdict."""

    name: str
    world_size: int
    micro_batch: int
    overrides: tuple[str, ...]
    verdict: str | None = None
    difference: Difference | None = None
    causes: tuple[Cause, ...] = ()
    error: Failed | None = None

    @property
    def title(self) -> str:
        """The row in a few words."""
        return f"{self.name}, {self.world_size} process(es), micro-batch {self.micro_batch}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that the module docstring describes."""
        found = self.difference
        return {
            "name": self.name,
            "world_size": self.world_size,
            "micro_batch": self.micro_batch,
            "overrides": list(self.overrides),
            "verdict": self.verdict,
            "loss": found and found.loss,
            "grad_norm": found and found.norm,
            "parameters": found and found.parameters,
            "first_step": found and found.first_step,
            "first_in": found and found.first_in,
            "tensors": [asdict(one) for one in found.tensors] if found else [],
            "undetermined": [asdict(one) for one in found.undetermined] if found else [],
            "missing": list(found.missing) if found else [],
            "causes": [asdict(one) for one in self.causes],
            "error": asdict(self.error) if self.error else None,
        }


@dataclass(frozen=True)
class Report:
    """The result of a comparison."""

    rows: tuple[Row, ...]
    steps: int
    bounds: Bounds
    micro_batch: int
    global_batch: int
    reference: Recorded
    plain: bool
    model: dict[str, Any]
    note: Cause | None

    @property
    def exit_code(self) -> int:
        """6 if something differs, else that of the first failure, else 0. Without a comparison, that of a rejection."""
        verdicts = [row.verdict for row in self.rows]
        if "differs" in verdicts:
            return TrainingError.exit_code
        failed = [row.error.exit_code for row in self.rows if row.verdict == "failed" and row.error]
        if failed:
            return failed[0]
        rejected = [row.error.exit_code for row in self.rows if row.verdict == "rejected" and row.error]
        compared = any(row.overrides and row.verdict in ("equal", "draws") for row in self.rows)
        return rejected[0] if rejected and not compared else FINISHED

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that the module docstring describes."""
        return {
            "equal": self.exit_code == FINISHED,
            "exit_code": self.exit_code,
            "steps": self.steps,
            "micro_batch": self.micro_batch,
            "global_batch": self.global_batch,
            "bounds": {
                "loss": self.bounds.loss,
                "grad_norm": self.bounds.norm,
                "parameters": self.bounds.parameters,
            },
            "reference": {
                "kind": "plain loop" if self.plain else "strategy none",
                "loss": list(self.reference.losses),
                "grad_norm": list(self.reference.norms),
            },
            "model": self.model,
            "note": asdict(self.note) if self.note else None,
            "cases": [row.to_dict() for row in self.rows],
        }
