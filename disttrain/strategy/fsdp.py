"""`fsdp`: parameters, gradients and optimizer state cut over the ranks by torch's `fully_shard` (FSDP2).

Order of wrapping: repeated blocks first, each a group of its own, then the model with all that is left (embeddings,
heads, tied weights: one group, so that a tie never crosses groups), then the optimizer over the shards.
0-d and empty parameters, which FSDP2 cannot cut, and those of a trainable objective stay whole on every rank; their
gradients are added up in one flat all-reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from disttrain.checkpoint import Shard
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, explain
from disttrain.logs import room_logger
from disttrain.model import build_model, fill, says_how
from disttrain.objective import Objective
from disttrain.runtime.seeds import generators_for
from disttrain.strategy.arithmetic import Gradients, run_micro_batches
from disttrain.strategy.construction import build_on_host, equip, name_parameters, settle
from disttrain.strategy.contract import AbstractStrategy, Ingredients, Prepared, StepOutcome, StepSums
from disttrain.strategy.state import copy_part, sharded_shards, whole_tensors
from disttrain.strategy.update import torch_step

_log = room_logger("strategy")


class FSDP(AbstractStrategy):
    """Full shard over the mesh's `shard` axis; a gradient is reduced once an optimizer step, in the last backward."""

    def prepare(self, ingredients: Ingredients) -> Prepared:
        if says_how(ingredients.make_model):
            model = build_model(ingredients.make_model, seed=self.world.seed, meta=True)
            settle(self.world, model)
            blocks = self._shard(model)
            self._fill(model)
        else:
            model = build_on_host(self.world, ingredients)
            blocks = self._shard(model)
            model.to(self.world.device)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        for name, block in blocks:
            # Blocks are gathered when they are called: a rank that calls another one would get a mixture of both.
            block.register_forward_pre_hook(lambda module, args, name=name: prepared.trail.note(name))
        return prepared

    def _shard(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Shard in place; returns the blocks that became groups of their own."""
        mesh = self.world.mesh.device_mesh["shard"]
        for parameter in model.parameters():
            # FSDP2 refuses other layouts (channels_last, a transposed tensor), which change no value.
            parameter.data = parameter.data.contiguous()
        uncut = {parameter for parameter in model.parameters() if parameter.dim() == 0 or parameter.numel() == 0}
        blocks = choose_blocks(model, self.options.blocks)
        for _, block in blocks:
            ignored = uncut & set(block.parameters())
            fully_shard(block, mesh=mesh, reshard_after_forward=self.options.reshard, ignored_params=ignored or None)
        root = fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=uncut or None)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Not recursive (torch 2.13): missed on one module, the norm is 5-7 % wrong and AdamW hides it.
                module.set_gradient_divide_factor(1.0)
                # Else the factor becomes a PREMUL_SUM, which gloo does not know.
                module.set_force_sum_reduction_for_comms(True)
        if hasattr(root, "set_reduce_scatter_unused_params"):
            root.set_reduce_scatter_unused_params(True)
        _log.info("fsdp: %d block(s) sharded each on its own, the rest as one group", len(blocks))
        return blocks

    def _fill(self, model: nn.Module) -> None:
        """Shard by shard: a rank holds one whole tensor at a time, and keeps its own part of it."""
        model.to_empty(device=self.world.device)
        places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        places.update(model.named_buffers(remove_duplicate=False))
        fill(model, generators_for(self.world.seed), lambda name, value: copy_part(places[name], value))

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        root = prepared.model
        assert isinstance(root, FSDPModule)

        @contextmanager
        def communicating(last: bool) -> Iterator[None]:
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
            yield

        with self._whole_reduced(prepared):
            return run_micro_batches(self.world, prepared, micro_batches, objective, flags, communicating=communicating)

    @contextmanager
    def _whole_reduced(self, prepared: Prepared) -> Iterator[None]:
        """Add up the gradients of what is held whole, in one all-reduce. Those of an accumulation before, which are
        added up already, stand aside meanwhile."""
        whole = [named.parameter for named in prepared.named if not isinstance(named.parameter, DTensor)]
        before = [parameter.grad for parameter in whole]
        for parameter in whole:
            parameter.grad = None
        yield
        if not whole:
            return
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in whole if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        for gradient, earlier in zip(gradients, before, strict=True):
            if earlier is not None:
                gradient.add_(earlier)

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        def square(gradients: Gradients) -> Tensor:
            cut = [isinstance(named.parameter, DTensor) for named in prepared.named]
            local = gradients.square(
                [gradient for gradient, is_cut in zip(gradients.locals, cut, strict=True) if is_cut]
            )
            dist.all_reduce(local)
            whole = [gradient for gradient, is_cut in zip(gradients.locals, cut, strict=True) if not is_cut]
            return local + gradients.square(whole) if whole else local

        outcome = torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm, square=square)
        free_whole(prepared.model)
        return outcome

    @contextmanager
    def frozen(self, prepared: Prepared) -> Iterator[None]:
        # Whole parameters learn requires_grad when they are gathered: none may be left from before, or behind.
        free_whole(prepared.model)
        with super().frozen(prepared):
            yield
            free_whole(prepared.model)

    def loaded(self, prepared: Prepared) -> None:
        super().loaded(prepared)
        free_whole(prepared.model)

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        free_whole(prepared.model)  # a forward without a backward, an evaluation or a teacher's, left it gathered
        return sharded_shards(prepared, stored, rank=self.world.group.rank, size=self.world.group.size)

    def whole(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        free_whole(prepared.model)
        return whole_tensors(prepared.model)


def free_whole(model: nn.Module) -> None:
    """Let go of gathered parameters that a forward without a backward left: the next forward gathers anew. Local."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def choose_blocks(model: nn.Module, wanted: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules that become groups of their own: those named, or else the repeated ones.

    `wanted` holds class names or patterns of module names. Unnamed: the children of a ModuleList or Sequential that
    share a class with another child, hold parameters, and share none of them with the rest of the model.
    Raises ConfigError where a wanted name matches nothing.
    """
    named = [
        (name, module) for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    if wanted is not None:
        chosen = [
            (name, module)
            for name, module in named
            if any(type(module).__name__ == want or fnmatchcase(name, want) for want in wanted)
        ]
        for want in wanted:
            if not any(type(module).__name__ == want or fnmatchcase(name, want) for name, module in chosen):
                raise ConfigError(
                    explain(
                        f"strategy.fsdp.blocks names {want!r}, a class or a pattern of module names.",
                        f"modules {', '.join(sorted({type(m).__name__ for _, m in named})) or 'without parameters'}",
                        "name one of these classes, a pattern such as 'layers.*', or leave blocks out",
                    )
                )
        return _outermost_last(chosen)
    return _outermost_last(_repeated(model))


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    chosen: list[tuple[str, nn.Module]] = []
    for prefix, parent in model.named_modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        if any(prefix.startswith(f"{name}.") for name, _ in chosen):
            continue
        classes = Counter(type(child) for child in parent.children())
        for key, child in parent.named_children():
            own: Counter[int] = Counter()
            for module in child.modules():
                own.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
            private = all(uses[key_] == count for key_, count in own.items())
            # A lone layer gains nothing from a group of its own; a block is a module of modules.
            if classes[type(child)] > 1 and own and private and any(True for _ in child.children()):
                chosen.append((f"{prefix}.{key}" if prefix else key, child))
    return chosen


def _outermost_last(chosen: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Inner groups must be sharded before the ones around them."""
    return sorted(chosen, key=lambda pair: -pair[0].count("."))
