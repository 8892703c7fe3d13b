"""What the processes of a world are asked to run, as JSON: a job of tasks over one config."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

APART: tuple[Any, ...] = (
    "checkpoint.resume=never",
    "checkpoint.every=null",
    "checkpoint.storage=null",
    "checkpoint.at_end=false",
    "report.every=1",
    "report.trackers=[]",
    "report.progress=false",
    "report.plot=false",
)
"""What keeps a run apart from the user's own, and has its norm read at every step."""


@dataclass(frozen=True)
class Task:
    """One run. `reference` is the plain loop at `micro_batch`; `quiet` names kinds of modules made quiet; `gradients`
    and `probe` have the reference record and find out more. `key` names its folder."""

    key: str
    overrides: tuple[str, ...] = ()
    micro_batch: int = 0
    reference: bool = False
    quiet: tuple[str, ...] = ()
    gradients: bool = False
    probe: bool = False


@dataclass(frozen=True)
class Job:
    """Tasks over the user's config under the user's overrides, `steps` each, recorded below `folder`."""

    config: str
    overrides: tuple[str, ...]
    folder: Path
    steps: int
    tasks: tuple[Task, ...] = field(default=())

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(
            Task(**{**one, "overrides": tuple(one["overrides"]), "quiet": tuple(one["quiet"])})
            for one in found["tasks"]
        )
        return cls(found["config"], tuple(found["overrides"]), Path(found["folder"]), found["steps"], tasks)
