"""Implements strategy `fsdp`: torch's `fully_shard` (FSDP2) shards parameters, gradients and optimizer state.

Order of wrapping: first the repeated blocks, each as one group. Then the rest of the model (embeddings, heads, tied
weights) as one group, so that a tie never crosses groups. Then the optimizer is built over the shards.

Tensors are sharded over the axis `mesh.shard`, and the shards are replicated over `mesh.replicate` (HSDP). Gradients
are added up over both. Over `mesh.tensor` layers are sharded first, by a plan. FSDP2 cannot shard 0-d and empty
parameters: they stay replicated, as do those of a trainable objective. Their gradients are added up in one flat
all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from disttrain.checkpoint import Shard
from disttrain.config.schema import PrecisionConfig
from disttrain.config.strategy_options import FSDPOptions
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, LaunchError, explain
from disttrain.model import build_model, fill, says_how
from disttrain.objective import Objective
from disttrain.optim.combined import factories_of
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.trials import is_exact_on_shards, kind_of
from disttrain.runtime import Device, Mesh, MeshSizes
from disttrain.runtime.mesh import group_across
from disttrain.runtime.seeds import generators_for
from disttrain.strategy.call_order import CallOrderCheck
from disttrain.strategy.canonical_boxes import copy_part, full_tensors, sharded_shards
from disttrain.strategy.construction import build_on_host, equip, name_parameters, reject_changed, settle
from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    MakeModel,
    Prepared,
    StepOutcome,
    StepSums,
    World,
)
from disttrain.strategy.fsdp.methods import gather_around_methods
from disttrain.strategy.fsdp.sharding import Groups, gather_once, reduces_every, shard_model
from disttrain.strategy.fsdp.tensor_parallel import TensorParallel, is_part
from disttrain.strategy.fsdp.tensor_plan import plan_modules
from disttrain.strategy.step.arithmetic import Gradients, add_up_together, earlier_apart, run_micro_batches
from disttrain.strategy.step.update import torch_step
from disttrain.torch_internals.fully_shard import missing_for_fsdp

_UNSHARDABLE: dict[type[Optimizer] | None, str] = {
    torch.optim.Adafactor: "whose norms torch's DTensor does not support",
    torch.optim.Muon: "whose bfloat16 products differ by parts, and which fails with few parts",
    torch.optim.Rprop: "whose masks torch's DTensor does not support",
}
"""Optimizers of torch 2.13 that do not work on shards, known without a process group to try them in. Two raise at the
first step. The weights that Muon trains differ by 4e-3 after five steps on two ranks."""


@dataclass(frozen=True)
class _Sharded:
    """How a prepared model is sharded.

    Attributes:
        groups: FSDP2's groups.
        order: checks the order in which ranks call blocks.
        tensor: tensor parallelism, if the mesh has that axis.
        every: whether gradients are reduced at every micro-batch, not only in the last one's backward.
        parts: indices in `named` of sharded parameters that this rank counts in the norm.
        full: indices in `named` of parameters that every rank holds in full.
    """

    groups: Groups
    order: CallOrderCheck
    tensor: TensorParallel | None
    every: bool
    parts: tuple[int, ...]
    full: tuple[int, ...]


class FSDP(AbstractStrategy):
    """Shards over the mesh's axis `shard`, and replicates the shards over `replicate`."""

    def __init__(self, options: FSDPOptions, world: World) -> None:
        super().__init__(options, world)
        mesh = world.mesh.device_mesh
        sizes = world.mesh.sizes
        self._mesh = mesh["replicate", "shard"] if sizes.replicate > 1 else mesh["shard"]
        # The ranks that together hold one copy of a model.
        self._holders = dist.group.WORLD if sizes.replicate == 1 else self._mesh.get_group("shard")
        if sizes.replicate > 1 and sizes.tensor > 1:
            self._holders = group_across(mesh, ("shard", "tensor"))

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Reject a torch that lacks internals of FSDP2, and an option `reshard` that does not fit the mesh."""
        if (missing := missing_for_fsdp()) is not None:
            raise LaunchError(
                explain(
                    "Cannot use strategy fsdp.",
                    f"torch {torch.__version__} has no usable {missing}, which fsdp needs and which has no public form",
                    "install torch 2.11 to 2.14, or use strategy ddp or deepspeed",
                )
            )
        if not isinstance(options.reshard, bool) and sizes.shard % options.reshard:
            divisors = [str(n) for n in range(2, sizes.shard + 1) if sizes.shard % n == 0]
            raise ConfigError(
                explain(
                    f"Cannot keep parameters in groups of ranks by strategy.fsdp.reshard={options.reshard}.",
                    f"it does not divide mesh.shard={sizes.shard}",
                    f"set it to {', '.join(divisors) or 'no number here'}, or to true or false",
                )
            )
        if not isinstance(options.reshard, bool) and sizes.tensor > 1:
            raise ConfigError(
                explain(
                    f"Cannot keep parameters in groups of ranks by strategy.fsdp.reshard={options.reshard}.",
                    f"torch would mix ranks of mesh.tensor={sizes.tensor} into those groups",
                    "set it to true or false with tensor parallel",
                )
            )

    @classmethod
    def check_model(cls, options: Any, sizes: MeshSizes, make_model: MakeModel) -> None:
        """Check the tensor plan on the meta device, for a model that can be built there."""
        if sizes.tensor > 1 and says_how(make_model):
            plan_modules(build_model(make_model, seed=0, meta=True), options.tensor, sizes.tensor)

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """Reject an optimizer that steps rows of a parameter differently. With a mesh, try it."""
        for one in factories_of(make):
            kind = kind_of(one)
            reason = _UNSHARDABLE.get(kind)
            # A mesh of one rank shows nothing. Either axis may have one.
            axes = ["shard"] if mesh is None or mesh.sizes.tensor == 1 else ["shard", "tensor"]
            if reason is None and mesh and not all(is_exact_on_shards(one, mesh.device_mesh[axis]) for axis in axes):
                reason = "whose step of a matrix differs or fails where it is sharded by rows"
            if reason is not None:
                raise ConfigError(
                    explain(
                        "Cannot use this optimizer with strategy fsdp, which shards parameters by rows as DTensors.",
                        f"the optimizer is {kind.__qualname__ if kind else 'one of yours'}, {reason}",
                        "use strategy ddp, or an elementwise optimizer such as AdamW or SGD",
                    )
                )

    def prepare(self, ingredients: Ingredients) -> Prepared:
        if says_how(ingredients.make_model):
            model = build_model(ingredients.make_model, seed=self.world.seed, meta=True)
            settle(self.world, model)
            tensor = self._cut(model)
            blocks = shard_model(model, self._mesh, self.options, self.world)
            self._fill(model)
        else:
            model = build_on_host(self.world, ingredients)
            tensor = self._cut(model)
            blocks = shard_model(model, self._mesh, self.options, self.world)
            self._place(model)
        gather_once(model, self.world)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        places = [(place, named.parameter) for place, named in enumerate(prepared.named)]
        prepared.wrapped = _Sharded(
            Groups(model),
            CallOrderCheck(blocks if self.world.group.size > 1 else ()),
            tensor,
            every=reduces_every(model, self.options, self.world),
            # A parameter outside the tensor plan is equal on all ranks of that axis, and one of them counts it.
            parts=tuple(
                k for k, one in places if isinstance(one, DTensor) and (self.world.mesh.counts or is_part(one))
            ),
            full=tuple(k for k, one in places if not isinstance(one, DTensor)),
        )
        gather_around_methods(model)
        for name, block in blocks:
            # Blocks are gathered when they are called. Ranks that call different blocks would get a mixture of both.
            block.register_forward_pre_hook(lambda module, args, name=name: prepared.calls.append(name))
        return prepared

    def _cut(self, model: nn.Module) -> TensorParallel | None:
        if self.world.mesh.sizes.tensor == 1:
            return None
        tensor = TensorParallel(self.world.mesh.device_mesh["tensor"], self.options.tensor)
        tensor.cut(model)
        return tensor

    def _place(self, model: nn.Module) -> None:
        """Move parameters and buffers to the device. With `offload` shards stay on the host."""
        if not self.options.offload:
            model.to(self.world.device)
            return
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.world.device)

    def _fill(self, model: nn.Module) -> None:
        """Initialize tensor by tensor. A rank holds one full tensor at a time, and keeps its part of it."""
        model.to_empty(device="cpu" if self.options.offload else self.world.device)
        self._place(model)
        places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        places.update(model.named_buffers(remove_duplicate=False))
        fill(model, generators_for(self.world.seed), lambda name, value: copy_part(places[name], value))

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        sharded: _Sharded = prepared.wrapped

        def communicating(last: bool) -> AbstractContextManager[Any]:
            # Over `replicate` gradients are added up once per step.
            sharded.groups.communicate(reduce=last or sharded.every, last=last)
            return nullcontext()

        step = self.world, prepared, micro_batches, objective, flags
        around: Any = {"communicating": communicating, "checked": sharded.order.checked}
        tensor = sharded.tensor
        if tensor is not None:
            around |= {"through": partial(tensor.through, model=prepared.model), "backward": tensor.backward}
        with self._reduce_replicated(prepared):
            sums = run_micro_batches(*step, **around)
        if changed := set(map(id, sharded.groups.changed())):
            sharded.groups.free_gathered()  # the module's parameters are the shards again
            names = [name for name, one in prepared.model.named_parameters() if id(one) in changed]
            reject_changed(names, "in the forward", "fsdp")
        if tensor is not None:
            tensor.check_alike(prepared.named)
        return sums

    @contextmanager
    def _reduce_replicated(self, prepared: Prepared) -> Iterator[None]:
        """Add up the gradients of parameters that every rank holds in full, in one all-reduce."""
        replicated = [prepared.named[place].parameter for place in prepared.wrapped.full]
        with earlier_apart(replicated):
            yield
            if not replicated:
                return
            for parameter in replicated:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in replicated if parameter.grad is not None]
            add_up_together(gradients, partial(dist.all_reduce, group=self.world.mesh.data_group))

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        sharded: _Sharded = prepared.wrapped

        def square(gradients: Gradients) -> Tensor:
            """Count each part once, in one all-reduce over the ranks that hold one copy of the model."""
            total = gradients.square([gradients.locals[place] for place in sharded.parts])
            total = total.to(self.world.device)  # offloaded gradients are on the host
            dist.all_reduce(total, group=self._holders)
            if not sharded.full:
                return total
            return total + gradients.square([gradients.locals[place] for place in sharded.full]).to(total.device)

        outcome = torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm, square=square)
        sharded.groups.free_gathered()
        return outcome

    @contextmanager
    def frozen(self, prepared: Prepared) -> Iterator[None]:
        # Gathered parameters copy requires_grad when they are gathered, so none may be left from before or after.
        prepared.wrapped.groups.free_gathered()
        with super().frozen(prepared):
            yield
            prepared.wrapped.groups.free_gathered()

    def loaded(self, prepared: Prepared) -> None:
        super().loaded(prepared)
        prepared.wrapped.groups.free_gathered()

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        # A forward without a backward, of an evaluation or a teacher, leaves parameters gathered.
        prepared.wrapped.groups.free_gathered()
        return sharded_shards(prepared, stored, rank=self.world.group.rank, size=self.world.group.size)

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        prepared.wrapped.groups.free_gathered()
        return full_tensors(prepared.model)
