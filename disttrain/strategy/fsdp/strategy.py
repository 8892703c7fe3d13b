"""`fsdp`: parameters, gradients and optimizer state cut over the ranks by torch's `fully_shard` (FSDP2).

Order of wrapping: repeated blocks first, each a group of its own, then the model with all that is left (embeddings,
heads, tied weights: one group, so that a tie never crosses groups), then the optimizer over the shards.
Over `mesh.shard` ranks tensors are cut in parts; over `mesh.replicate` the parts are held again (HSDP), and gradients
added up over both. 0-d and empty parameters, which FSDP2 cannot cut, and those of a trainable objective stay whole on
every rank; their gradients are added up in one flat all-reduce. Over `mesh.tensor` layers are cut first, by a plan.
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
from disttrain.strategy.fsdp.sharding import Groups, introduce, reduces_every, shard_model
from disttrain.strategy.fsdp.tensor_parallel import TensorParallel, is_part
from disttrain.strategy.fsdp.tensor_plan import plan_modules
from disttrain.strategy.step.arithmetic import Gradients, add_up_together, earlier_apart, run_micro_batches
from disttrain.strategy.step.update import torch_step
from disttrain.torch_internals.fully_shard import missing_for_fsdp

_UNSHARDABLE: dict[type[Optimizer] | None, str] = {
    torch.optim.Adafactor: "whose norms torch's DTensor does not take",
    torch.optim.Muon: "whose products in bfloat16 come out otherwise by parts, and which fails where parts are few",
    torch.optim.Rprop: "whose masks torch's DTensor does not take",
}
"""Of torch's own (2.13), known before there is a group to try them in: two raise at the first step; the weights that
Muon trains differ by 4e-3 after five steps at two ranks."""


@dataclass(frozen=True)
class _Sharded:
    """How a prepared model is cut: its groups, its tensor plan if it has one, and whether gradients are reduced at
    `every` micro-batch, not in the last one's backward alone. Of the trained parameters, by place in `named`: `parts`
    are cut and counted in this rank's part of the norm, `whole` are held by every rank. `order` watches the blocks."""

    groups: Groups
    order: CallOrderCheck
    tensor: TensorParallel | None
    every: bool
    parts: tuple[int, ...]
    whole: tuple[int, ...]


class FSDP(AbstractStrategy):
    """Full shard over the mesh's `shard` axis, copies of the shards over `replicate`."""

    def __init__(self, options: FSDPOptions, world: World) -> None:
        super().__init__(options, world)
        mesh = world.mesh.device_mesh
        sizes = world.mesh.sizes
        self._mesh = mesh["replicate", "shard"] if sizes.replicate > 1 else mesh["shard"]
        # The ranks that hold one copy of a model between them.
        self._holders = dist.group.WORLD if sizes.replicate == 1 else self._mesh.get_group("shard")
        if sizes.replicate > 1 and sizes.tensor > 1:
            self._holders = group_across(mesh, ("shard", "tensor"))

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """The groups of ranks that `reshard` keeps parameters in are parts of `mesh.shard`."""
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
                    f"strategy.fsdp.reshard={options.reshard} keeps parameters in groups of so many ranks.",
                    f"mesh.shard={sizes.shard}, which it does not divide",
                    f"set it to {', '.join(divisors) or 'no number here'}, or to true or false",
                )
            )
        if not isinstance(options.reshard, bool) and sizes.tensor > 1:
            raise ConfigError(
                explain(
                    f"strategy.fsdp.reshard={options.reshard} keeps parameters in groups of ranks.",
                    f"mesh.tensor={sizes.tensor}, whose ranks torch would mix into those groups",
                    "set it to true or false with tensor parallel",
                )
            )

    @classmethod
    def check_model(cls, options: Any, sizes: MeshSizes, make_model: MakeModel) -> None:
        """The tensor plan fits a model that says how it is filled, whose shapes cost nothing."""
        if sizes.tensor > 1 and says_how(make_model):
            plan_modules(build_model(make_model, seed=0, meta=True), options.tensor, sizes.tensor)

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """It steps a parameter that is cut by rows as it would step the whole; with a mesh that is tried."""
        for one in factories_of(make):
            kind = kind_of(one)
            reason = _UNSHARDABLE.get(kind)
            # A mesh of one rank shows nothing, whichever axis cuts.
            axes = ["shard"] if mesh is None or mesh.sizes.tensor == 1 else ["shard", "tensor"]
            if reason is None and mesh and not all(is_exact_on_shards(one, mesh.device_mesh[axis]) for axis in axes):
                reason = "which steps a matrix otherwise, or not at all, where it is cut by rows"
            if reason is not None:
                raise ConfigError(
                    explain(
                        "strategy.name=fsdp cuts parameters by rows, and each optimizer steps on DTensors of them.",
                        f"{kind.__qualname__ if kind else 'an optimizer'}, {reason}",
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
            self._move_home(model)
        introduce(model, self.world)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        places = [(place, named.parameter) for place, named in enumerate(prepared.named)]
        prepared.wrapped = _Sharded(
            Groups(model),
            CallOrderCheck(blocks if self.world.group.size > 1 else ()),
            tensor,
            every=reduces_every(model, self.options, self.world),
            # What no tensor plan cuts is the same on all ranks of the axis: one of them brings it.
            parts=tuple(
                k for k, one in places if isinstance(one, DTensor) and (self.world.mesh.counts or is_part(one))
            ),
            whole=tuple(k for k, one in places if not isinstance(one, DTensor)),
        )
        gather_around_methods(model)
        for name, block in blocks:
            # Blocks are gathered when they are called: a rank that calls another one would get a mixture of both.
            block.register_forward_pre_hook(lambda module, args, name=name: prepared.calls.append(name))
        return prepared

    def _cut(self, model: nn.Module) -> TensorParallel | None:
        if self.world.mesh.sizes.tensor == 1:
            return None
        tensor = TensorParallel(self.world.mesh.device_mesh["tensor"], self.options.tensor)
        tensor.cut(model)
        return tensor

    def _move_home(self, model: nn.Module) -> None:
        """Where parameters and buffers live between steps: the device, but shards on the host under `offload`."""
        if not self.options.offload:
            model.to(self.world.device)
            return
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.world.device)

    def _fill(self, model: nn.Module) -> None:
        """Shard by shard: a rank holds one whole tensor at a time, and keeps its own part of it."""
        model.to_empty(device="cpu" if self.options.offload else self.world.device)
        self._move_home(model)
        places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        places.update(model.named_buffers(remove_duplicate=False))
        fill(model, generators_for(self.world.seed), lambda name, value: copy_part(places[name], value))

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        sharded: _Sharded = prepared.wrapped

        def communicating(last: bool) -> AbstractContextManager[Any]:
            # Over `replicate` shards are added up once, whatever was before.
            sharded.groups.communicate(reduce=last or sharded.every, last=last)
            return nullcontext()

        step = self.world, prepared, micro_batches, objective, flags
        around: Any = {"communicating": communicating, "checked": sharded.order.checked}
        tensor = sharded.tensor
        if tensor is not None:
            around |= {"through": partial(tensor.through, model=prepared.model), "backward": tensor.backward}
        with self._whole_reduced(prepared):
            sums = run_micro_batches(*step, **around)
        if changed := set(map(id, sharded.groups.changed())):
            sharded.groups.free_whole()  # the parameters are the cut ones then
            names = [name for name, one in prepared.model.named_parameters() if id(one) in changed]
            reject_changed(names, "in the forward", "fsdp")
        if tensor is not None:
            tensor.check_alike(prepared.named)
        return sums

    @contextmanager
    def _whole_reduced(self, prepared: Prepared) -> Iterator[None]:
        """Add up the gradients of what is held whole, in one all-reduce."""
        whole = [prepared.named[place].parameter for place in prepared.wrapped.whole]
        with earlier_apart(whole):
            yield
            if not whole:
                return
            for parameter in whole:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in whole if parameter.grad is not None]
            add_up_together(gradients, partial(dist.all_reduce, group=self.world.mesh.data_group))

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        sharded: _Sharded = prepared.wrapped

        def square(gradients: Gradients) -> Tensor:
            """Each part once, whoever else holds it, in one all-reduce over the ranks that hold one copy."""
            total = gradients.square([gradients.locals[place] for place in sharded.parts])
            total = total.to(self.world.device)  # offloaded gradients are the host's
            dist.all_reduce(total, group=self._holders)
            if not sharded.whole:
                return total
            return total + gradients.square([gradients.locals[place] for place in sharded.whole]).to(total.device)

        outcome = torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm, square=square)
        sharded.groups.free_whole()
        return outcome

    @contextmanager
    def frozen(self, prepared: Prepared) -> Iterator[None]:
        # Whole parameters learn requires_grad when they are gathered: none may be left from before, or behind.
        prepared.wrapped.groups.free_whole()
        with super().frozen(prepared):
            yield
            prepared.wrapped.groups.free_whole()

    def loaded(self, prepared: Prepared) -> None:
        super().loaded(prepared)
        prepared.wrapped.groups.free_whole()

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        # A forward without a backward, an evaluation's or a teacher's, left it gathered.
        prepared.wrapped.groups.free_whole()
        return sharded_shards(prepared, stored, rank=self.world.group.rank, size=self.world.group.size)

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        prepared.wrapped.groups.free_whole()
        return full_tensors(prepared.model)
