"""What a proof found, as values for programs. Pure.

The JSON of `disttrain parity --json`, one object:
`equal` (no case differs, failed or was refused beyond what was asked), `exit_code`, `steps`, `micro_batch` and
`global_batch` (samples, of the reference), `bounds` {loss, grad_norm, parameters}: relative;
`reference` {kind: `plain loop` or `strategy none`, loss: [...], grad_norm: [...]}: by step;
`model` {draws, batch_norms, changing_buffers, couples_items, elementwise, stream}: what trying it showed;
`note`: a cause that lies in the objective, or null;
`cases`, each {name, world_size, micro_batch, overrides, verdict, loss, grad_norm, parameters (largest relative
differences over the steps, null where there is none), first_step, first_in, tensors and undetermined (each {name, step,
relative, undetermined, entries}), missing, causes (each {cause, text, shown_by}), error {exit_code, text} or null}.

Verdicts: `equal`; `draws` (another micro-batch, and dropout draws for each anew: as promised); `differs`; `refused`
(before training, by exit code 2 or 3); `failed`; `skipped` (too few GPUs). An
`equal` case has a cause where something changed nothing here and would elsewhere (a clip left to DeepSpeed).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from disttrain.errors import FINISHED, TrainingError
from disttrain.parity.causes import Cause
from disttrain.parity.compare import Bounds, Difference
from disttrain.parity.launch import Failed
from disttrain.parity.recorded import Recorded


@dataclass(frozen=True)
class Row:
    """One case, or the reference itself at another micro-batch, and what came of it."""

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
        """As in the module's docstring."""
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
    """A whole proof."""

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
        """6 where something differs; else the first failure's; else 0, or a refusal's where nothing was compared."""
        verdicts = [row.verdict for row in self.rows]
        if "differs" in verdicts:
            return TrainingError.exit_code
        failed = [row.error.exit_code for row in self.rows if row.verdict == "failed" and row.error]
        if failed:
            return failed[0]
        refused = [row.error.exit_code for row in self.rows if row.verdict == "refused" and row.error]
        compared = any(row.overrides and row.verdict in ("equal", "draws") for row in self.rows)
        return refused[0] if refused and not compared else FINISHED

    def to_dict(self) -> dict[str, Any]:
        """As in the module's docstring."""
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
