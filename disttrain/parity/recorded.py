"""Records the losses, norms and tensors of a short run, and reads them back one tensor at a time.

A run has one folder with `result.json`, `weights-K.safetensors` after step K (0: the initial weights), and
`gradients-K.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

RESULT = "result.json"


class Recorder:
    """Writes the folder of a run while the run trains. Exactly one rank has a recorder. Local."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def weights(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Records every parameter and persistent buffer after `step`, unsharded."""
        self._write(f"weights-{step}", tensors)

    def gradients(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Records every gradient of `step`, divided by the weight of the batch and not clipped."""
        self._write(f"gradients-{step}", tensors)

    def finish(self, losses: Sequence[float], norms: Sequence[float | None], **facts: Any) -> None:
        """Writes the result. A run without a result did not finish."""
        text = json.dumps({"losses": list(losses), "norms": list(norms), **facts})
        (self._folder / RESULT).write_text(text, encoding="utf-8")

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        # Tied parameters share one storage under two names, which safetensors rejects.
        copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(copies, self._folder / f"{name}.safetensors")


@dataclass(frozen=True)
class Recorded:
    """The numbers of a finished run. `facts` holds whatever else its worker measured."""

    folder: Path
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Reads a folder. Raises FileNotFoundError if the run did not finish."""
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        norms = tuple(0.0 if norm is None else norm for norm in found.pop("norms"))
        return cls(folder, tuple(found.pop("losses")), norms, found)

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return len(self.losses)

    def names(self, step: int = 0, kind: str = "weights") -> list[str]:
        """Returns the names of the tensors recorded at `step`."""
        with safe_open(self.folder / f"{kind}-{step}.safetensors", framework="pt") as file:
            return sorted(file.keys())

    def tensor(self, name: str, step: int, kind: str = "weights") -> Tensor:
        """Returns one tensor on the CPU."""
        with safe_open(self.folder / f"{kind}-{step}.safetensors", framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found
