"""Builds the errors for folders and files that are not part of a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.checkpoint.form.manifest import MANIFEST
from disttrain.checkpoint.storage.location import Location
from disttrain.errors import DamagedError, explain

_CONVERTER = "; `disttrain ckpt convert PATH TARGET` converts it to a checkpoint"


def describe_foreign_folder(names: Sequence[str]) -> str:
    """Describe the content of a folder that has no manifest."""
    if not names:
        return "an empty folder"
    if ".metadata" in names:
        return f"a torch distributed checkpoint (.metadata), which is a pickle and is not read{_CONVERTER}"
    if any(name.startswith(("zero_", "mp_rank_")) or name == "latest" for name in names):
        return f"a DeepSpeed checkpoint, which is a pickle and is not read{_CONVERTER}"
    return f"no {MANIFEST} among {', '.join(names[:5])}"


def not_a_checkpoint(path: Location, problem: str) -> DamagedError:
    """Return the error for a folder or file that differs from what a checkpoint contains."""
    return DamagedError(
        explain(f"{path} is not part of an intact checkpoint.", problem, "name an intact folder step-NNNNNNNN of a run")
    )
