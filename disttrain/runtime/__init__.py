"""Provides a process's surroundings: launch, device, mesh, process group and seeds. Used by strategy and engine.

The names are loaded on first use, because an entry point reads the launch before it imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.runtime.device import Device, apply_device, check_device, choose_device
    from disttrain.runtime.environment import Launch, export_for_libraries, read_launch
    from disttrain.runtime.group import Group, OtherRankError
    from disttrain.runtime.mesh import Mesh, MeshSizes, build_mesh, plan_mesh

__all__ = [
    "Device",
    "Group",
    "Launch",
    "Mesh",
    "MeshSizes",
    "OtherRankError",
    "apply_device",
    "build_mesh",
    "check_device",
    "choose_device",
    "export_for_libraries",
    "plan_mesh",
    "read_launch",
]

_MODULES = {
    "device": ("Device", "apply_device", "check_device", "choose_device"),
    "environment": ("Launch", "export_for_libraries", "read_launch"),
    "group": ("Group", "OtherRankError"),
    "mesh": ("Mesh", "MeshSizes", "build_mesh", "plan_mesh"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
