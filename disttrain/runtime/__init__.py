"""Where a process stands: launch, device, mesh, process group, seeds. Enters: strategy, engine."""

from disttrain.runtime.device import Device, apply_device, choose_device
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
    "choose_device",
    "export_for_libraries",
    "plan_mesh",
    "read_launch",
]
