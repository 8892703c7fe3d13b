"""Shards a model's layers over the mesh's `tensor` axis, whose ranks compute each sample together.

`TensorParallel.cut` replaces parameters by DTensors and adds hooks to the modules that a plan names. Everything between
those modules computes on plain tensors, equally on every rank. Parameters outside the plan stay replicated on the axis
and get equal gradients, which `check_alike` verifies once. Tied weights that a plan shards differently are rejected.
So is a time dim that the degree does not divide. Strategy `fsdp` calls this before it shards.
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
"""Relative difference up to which norms of one gradient count as equal between ranks. Kernels that add atomically
differ by rounding. A partial gradient differs by far more."""


class TensorParallel:
    """Tensor parallelism of one model over `mesh`, the one-dimensional mesh of the `tensor` axis."""

    def __init__(self, mesh: DeviceMesh, options: TensorOptions) -> None:
        self._mesh, self._options = mesh, options
        self._checked = False
        self._in_sharded_loss = False

    def cut(self, model: nn.Module) -> None:
        """Replace parameters by their parts and hook the modules, in place. Local.

        Each rank shards the full tensor that it holds, which may be on the meta device. Raises ConfigError for a plan
        that does not fit the model.
        """
        styles = plan_modules(model, self._options, self._mesh.size())
        modules = dict(model.named_modules())
        parts: dict[int, nn.Parameter] = {}
        originals: list[nn.Parameter] = []  # kept alive, so that no new object gets the same id
        inputs: dict[str, InputRedistribution] = {}
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
                    _reject_tie(f"{name}.{key}", f"another name has {part.placements}")  # type: ignore[attr-defined]
                module.register_parameter(key, part)
            if style.partial:
                _use_locally(module)
                continue
            if parent not in inputs:
                inputs[parent] = InputRedistribution(self._mesh)
                modules[parent].register_forward_hook(inputs[parent].close, always_call=True)
            module.register_forward_pre_hook(partial(inputs[parent].enter, style), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, name, style))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in parts and parameter is not parts[id(parameter)]:
                _reject_tie(name, "this name is not in the plan")

    def _part(self, parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
        part = distribute_tensor(parameter.detach(), self._mesh, [placement], src_data_rank=None)
        return nn.Parameter(part, requires_grad=parameter.requires_grad)

    def _leave(self, name: str, style: Style, module: nn.Module, args: Any, output: Any) -> Any:
        """Return a module's output in the plan's placement, as this rank's plain tensor."""
        by_features = output.placements[0].is_shard(output.dim() - 1)
        if self._in_sharded_loss and style.head and by_features:
            return output
        if style.as_head is not None and by_features:
            style = style.as_head
        if style.gives == TIME and output.shape[1] % self._mesh.size():
            raise ConfigError(
                explain(
                    "Cannot shard samples along time (strategy.fsdp.tensor.sequence=true).",
                    f"mesh.tensor={self._mesh.size()} does not divide dim 1 of {name!r}'s output {tuple(output.shape)}",
                    "choose a context that the degree divides, or leave sequence out",
                )
            )
        return output.redistribute(placements=[counted_from_front(style.gives, output.dim())]).to_local()

    def _drop(self, module: nn.Dropout, x: Tensor) -> Tensor:
        """Apply dropout to this rank's part of the time dim. The full mask is drawn, as one rank would draw it."""
        if not module.training or module.p == 0.0:
            return x
        times = x.shape[1]
        full = x.new_ones(x.shape[0], times * self._mesh.size(), *x.shape[2:])
        return x * F.dropout(full, module.p).narrow(1, times * self._mesh.get_local_rank(), times)

    # ------------------------------------------------------------------ losses and gradients

    @contextmanager
    def sharded_loss(self) -> Iterator[None]:
        """Keep a head's output sharded, and let cross entropy handle it. Surrounds forward and backward in training."""
        if not self._options.loss:
            yield
            return
        self._in_sharded_loss = True
        try:
            with loss_parallel():
                yield
        finally:
            self._in_sharded_loss = False

    def through(self, objective: Objective, batch: Any, context: Context, *, model: nn.Module) -> tuple[Any, Any, Any]:
        """Call the objective on a model with sharded logits, and return its sums as plain tensors.

        Collective over the axis where a sum is still sharded.
        """
        with self.sharded_loss():
            loss = objective(model, batch, context)
        return _plain(loss.totals), _plain(loss.weights), _plain(loss.sums)

    def backward(self, total: Tensor) -> None:
        """Back-propagate a total, which may be a loss over sharded logits."""
        with self.sharded_loss():
            torch.autograd.backward(total)

    def check_alike(self, named: Sequence[NamedParameter]) -> None:
        """Check once that gradients of parameters outside the plan are equal on all ranks of the axis. Collective.

        Raises TrainingError on all ranks otherwise: a module outside the plan then computes on a part of the heads or
        of the time dim.
        """
        if self._checked:
            return
        self._checked = True
        replicated = [one for one in named if not is_part(one.parameter) and one.parameter.grad is not None]
        if not replicated:
            return
        norms = torch.stack([_norm(one.parameter.grad) for one in replicated])
        ends = torch.stack([norms, -norms])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._mesh.get_group())
        most, least = ends[0], -ends[1]
        apart = ((most - least) > _ALIKE * most).tolist()
        other = torch.tensor(float(any(apart)), device=norms.device)
        dist.all_reduce(other, dist.ReduceOp.MAX)  # over all ranks, so that all raise
        if not other.item():
            return
        names = [one.name for one, differs in zip(replicated, apart, strict=True) if differs] or [
            "a parameter elsewhere"
        ]
        raise TrainingError(
            explain(
                "Cannot train parameters outside the tensor plan: their gradients differ between ranks of mesh.tensor.",
                f"they differ for {', '.join(names[:5])}",
                "name their modules in the plan: replicated_with_grad_allreduce between colwise and rowwise layers, "
                "sequence_parallel for modules that compute on a part of the time dim",
            )
        )


class InputRedistribution:
    """Redistributes inputs of the sharded modules of one parent.

    Siblings that read the same tensor share one gather of it, and one reduction of its gradients.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._last: tuple[Tensor, Style, DTensor] | None = None

    def enter(self, style: Style, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Pass the first argument as a DTensor in the placement that the module computes on. A forward pre-hook."""
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
                inner = DTensor.from_local(x, self._mesh, [counted_from_front(style.takes, x.dim())], run_check=False)
            inner = inner.redistribute(placements=[counted_from_front(style.wants, x.dim())])
            self._last = (x, style, inner)
        return ((inner, *args[1:]), kwargs) if first is None else (args, {**kwargs, first: inner})

    def close(self, *_: Any) -> None:
        """Release the input when the parent's forward ends. A forward hook."""
        self._last = None


def counted_from_front(placement: Placement, dims: int) -> Placement:
    """Return a placement with its dim counted from the front. Pure."""
    return Shard(placement.dim % dims) if isinstance(placement, Shard) else placement


def is_part(parameter: Tensor) -> bool:
    """Whether a parameter is sharded over a mesh's `tensor` axis. Local."""
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    return any(a == "tensor" and p.is_shard() for a, p in zip(axes, parameter.placements, strict=True))


def _use_locally(module: nn.Module) -> None:
    """Let a module compute with plain tensors, on this rank's part of the input: gradients are summed over ranks."""
    shadowed: list[str] = []

    def before(module: nn.Module, args: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
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


def _reject_tie(name: str, problem: str) -> None:
    raise ConfigError(
        explain(
            f"Cannot shard {name!r}, which is tied: the tensor plan must treat all its names equally.",
            problem,
            "name all its modules in the plan, with embedding_rowwise for the table and colwise_rep for the head",
        )
    )
