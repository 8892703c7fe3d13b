"""What a run of a few steps left behind for comparison: losses and norms, and each step's tensors, read one at a time.

A folder a run: `result.json`, `weights-K.safetensors` after step K (0: the initial weights), `gradients-K.safetensors`.
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
    """Writes a run's folder as the run goes; one rank has one. Local."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def weights(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Every parameter and persistent buffer after `step`, whole."""
        self._write(f"weights-{step}", tensors)

    def gradients(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Every gradient of `step`, over its weight and not clipped."""
        self._write(f"gradients-{step}", tensors)

    def finish(self, losses: Sequence[float], norms: Sequence[float | None], **facts: Any) -> None:
        """The run came to its end: only now is there a result."""
        text = json.dumps({"losses": list(losses), "norms": list(norms), **facts})
        (self._folder / RESULT).write_text(text, encoding="utf-8")

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        # A tie is one storage under two names, which safetensors refuses.
        whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(whole, self._folder / f"{name}.safetensors")


@dataclass(frozen=True)
class Recorded:
    """A finished run's numbers. `facts` is what else its worker found."""

    folder: Path
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Raises FileNotFoundError where the run did not come to its end."""
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        norms = tuple(0.0 if norm is None else norm for norm in found.pop("norms"))
        return cls(folder, tuple(found.pop("losses")), norms, found)

    @property
    def steps(self) -> int:
        """Optimizer steps that were made."""
        return len(self.losses)

    def names(self, step: int = 0, kind: str = "weights") -> list[str]:
        """The tensors' names."""
        with safe_open(self.folder / f"{kind}-{step}.safetensors", framework="pt") as file:
            return sorted(file.keys())

    def tensor(self, name: str, step: int, kind: str = "weights") -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.folder / f"{kind}-{step}.safetensors", framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found
