"""Tensor parallel: a model's layers cut over the mesh's `tensor` axis, whose ranks compute each sample together.

`TensorParallel.cut` puts DTensors in the place of parameters and hooks around the modules that a plan names; what lies
between them computes on plain tensors, on every rank alike. Parameters that no plan names stay as they are: all ranks
of the axis hold the same, and come to the same gradient, which `check_alike` proves once.
Refuses ties that a plan cuts apart, and times that do not divide. Enters: strategy fsdp, before it shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from disttrain.config.strategy_options import TensorOptions
from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.objective import Context, Objective
from disttrain.optim.named import NamedParameter
from disttrain.strategy.fsdp.tensor_plan import TIME, Style, plan_modules

_ALIKE = 1e-3
"""How far norms of one gradient may be apart on ranks that compute it alike: kernels that add atomically differ by
rounding; a part of a gradient is another number altogether."""


class TensorParallel:
    """One model over `mesh`, the one-dimensional mesh of the `tensor` axis."""

    def __init__(self, mesh: DeviceMesh, options: TensorOptions) -> None:
        self._mesh, self._options = mesh, options
        self._checked = False
        self._losing = False

    def cut(self, model: nn.Module) -> None:
        """Replace parameters by their parts and hook the modules, in place. Local: each rank cuts its own whole tensor,
        or the shape of one. Raises ConfigError for what the plan cannot do."""
        styles = plan_modules(model, self._options, self._mesh.size())
        modules = dict(model.named_modules())
        parts: dict[int, nn.Parameter] = {}
        originals: list[nn.Parameter] = []  # kept, so that no id is given to another meanwhile
        entrances: dict[str, Entrance] = {}
        for name, style in styles.items():
            module, parent = modules[name], name.rpartition(".")[0]
            if isinstance(module, nn.Dropout):
                module.forward = partial(self._drop, module)  # type: ignore[method-assign]
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                dim = style.weight if key == "weight" else style.bias
                placement: Placement = Replicate() if dim is None else Shard(dim)
                if id(parameter) not in parts:
                    originals.append(parameter)
                    parts[id(parameter)] = self._part(parameter, placement)
                part = parts[id(parameter)]
                if part.placements != (placement,):  # type: ignore[attr-defined]
                    _reject_tie(f"{name}.{key}", f"{part.placements} by another name")  # type: ignore[attr-defined]
                module.register_parameter(key, part)
            if style.partial:
                _use_locally(module)
                continue
            if parent not in entrances:
                entrances[parent] = Entrance(self._mesh)
                modules[parent].register_forward_hook(entrances[parent].close, always_call=True)
            module.register_forward_pre_hook(partial(entrances[parent].enter, style), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, name, style))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in parts and parameter is not parts[id(parameter)]:
                _reject_tie(name, "not in the plan")

    def _part(self, parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
        part = distribute_tensor(parameter.detach(), self._mesh, [placement], src_data_rank=None)
        return nn.Parameter(part, requires_grad=parameter.requires_grad)

    def _leave(self, name: str, style: Style, module: nn.Module, args: Any, output: Any) -> Any:
        """A module's output in the layout that the plan gives it, as this rank's plain tensor."""
        by_features = output.placements[0].is_shard(output.dim() - 1)
        if self._losing and style.head and by_features:
            return output
        if style.as_head is not None and by_features:
            style = style.as_head
        if style.gives == TIME and output.shape[1] % self._mesh.size():
            raise ConfigError(
                explain(
                    "strategy.fsdp.tensor.sequence=true cuts each sample along time.",
                    f"an output {tuple(output.shape)} of {name!r} over mesh.tensor={self._mesh.size()}",
                    "choose a context that the degree divides, or leave sequence out",
                )
            )
        return output.redistribute(placements=[layout(style.gives, output.dim())]).to_local()

    def _drop(self, module: nn.Dropout, x: Tensor) -> Tensor:
        """Dropout of this rank's times, as it is of them when one rank has all: the whole mask is drawn."""
        if not module.training or module.p == 0.0:
            return x
        times = x.shape[1]
        whole = x.new_ones(x.shape[0], times * self._mesh.size(), *x.shape[2:])
        return x * F.dropout(whole, module.p).narrow(1, times * self._mesh.get_local_rank(), times)

    # ------------------------------------------------------------------ losses and gradients

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Meanwhile a head's output stays cut, and cross entropy knows it: around forward and backward of training."""
        if not self._options.loss:
            yield
            return
        self._losing = True
        try:
            with loss_parallel():
                yield
        finally:
            self._losing = False

    def through(self, objective: Objective, batch: Any, context: Context, *, model: nn.Module) -> tuple[Any, Any, Any]:
        """The objective on a model whose logits are cut; its sums come back as plain tensors. Collective over the axis
        where a sum is still cut."""
        with self.losing():
            loss = objective(model, batch, context)
        return _plain(loss.totals), _plain(loss.weights), _plain(loss.sums)

    def backward(self, total: Tensor) -> None:
        """Back-propagate, through losses over cut logits too."""
        with self.losing():
            torch.autograd.backward(total)

    def check_alike(self, named: Sequence[NamedParameter]) -> None:
        """Once: the gradients of what no plan cuts are the same on all ranks of the axis. Collective over it.

        Raises TrainingError on all ranks where not: a part of the model works on a part of the heads or of the times.
        """
        if self._checked:
            return
        self._checked = True
        whole = [one for one in named if not is_part(one.parameter) and one.parameter.grad is not None]
        if not whole:
            return
        norms = torch.stack([_norm(one.parameter.grad) for one in whole])
        ends = torch.stack([norms, -norms])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._mesh.get_group())
        most, least = ends[0], -ends[1]
        apart = ((most - least) > _ALIKE * most).tolist()
        other = torch.tensor(float(any(apart)), device=norms.device)
        dist.all_reduce(other, dist.ReduceOp.MAX)  # a group of the axis alone must not leave the others waiting
        if not other.item():
            return
        names = [one.name for one, differs in zip(whole, apart, strict=True) if differs] or ["a parameter elsewhere"]
        raise TrainingError(
            explain(
                "Parameters that the tensor plan does not name have one gradient on all ranks of mesh.tensor.",
                f"other ones on each rank: {', '.join(names[:5])}",
                "name their modules in the plan: replicated_with_grad_allreduce between colwise and rowwise layers, "
                "sequence_parallel for what works on a part of the times",
            )
        )


class Entrance:
    """How inputs get into the cut modules of one parent: siblings that read the same tensor share its gathering, and
    the sum of its gradients is added up over ranks once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._last: tuple[Tensor, Style, DTensor] | None = None

    def enter(self, style: Style, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A forward pre-hook: the first argument as a DTensor in the layout that the module computes on."""
        first = next(iter(kwargs)) if not args else None
        x = args[0] if first is None else kwargs[first]
        if style.as_head is not None and x.is_floating_point():
            style = style.as_head
        last = self._last
        if last is not None and last[0] is x and (last[1].takes, last[1].wants) == (style.takes, style.wants):
            inner = last[2]
        else:
            inner = x
            if not isinstance(x, DTensor):
                inner = DTensor.from_local(x, self._mesh, [layout(style.takes, x.dim())], run_check=False)
            inner = inner.redistribute(placements=[layout(style.wants, x.dim())])
            self._last = (x, style, inner)
        return ((inner, *args[1:]), kwargs) if first is None else (args, {**kwargs, first: inner})

    def close(self, *_: Any) -> None:
        """The parent's forward has ended: nothing of it is kept."""
        self._last = None


def layout(placement: Placement, dims: int) -> Placement:
    """The same with its dim counted from the front. Pure."""
    return Shard(placement.dim % dims) if isinstance(placement, Shard) else placement


def is_part(parameter: Tensor) -> bool:
    """Whether a parameter is cut over a mesh's `tensor` axis. Local."""
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    return any(a == "tensor" and p.is_shard() for a, p in zip(axes, parameter.placements, strict=True))


def _use_locally(module: nn.Module) -> None:
    """A module computes with plain tensors, each rank on its own part: gradients are parts of a sum."""
    shadowed: list[str] = []

    def before(module: nn.Module, args: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                shadowed.append(key)
                # An attribute of the instance is found before the parameter of its name.
                vars(module)[key] = parameter.to_local(grad_placements=[Partial()])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for key in shadowed:
            del vars(module)[key]
        shadowed.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}


def _norm(gradient: Any) -> Tensor:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    norm: Tensor = local.double().norm()
    return norm


def _reject_tie(name: str, found: str) -> None:
    raise ConfigError(
        explain(
            f"The tensor plan cuts {name!r}, which is one tensor under several names, alike under all of them.",
            found,
            "name all its modules in the plan, with embedding_rowwise for the table and colwise_rep for the head",
        )
    )
