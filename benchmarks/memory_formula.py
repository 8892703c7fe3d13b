"""Predicts the memory of one rank at the worst moment of a training step, from shapes and settings. Pure; no torch.

Derived from the sources of torch and DeepSpeed before anything was measured. `memory.py` measures it, and
`docs/measurements/memory.md` records the result. Counts elements of the master dtype: parameters, masters, optimizer
state, gradients, gathered groups and buckets, and for fsdp the activations that are alive at that moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import zero_gathers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """The trainable tensors of a model, each once under its first name.

    `blocks` are name prefixes in the order of the forward; tensors outside the blocks form the root. `head` is the
    tensor that computes logits. If it is `tied`, it is also the token table and receives a gradient at both ends of the
    backward. `activations` is the number of elements of all blocks' activations.
    """

    parameters: Mapping[str, Shape]
    blocks: Sequence[str]
    head: str
    tied: bool
    activations: int = 0

    def numel(self, prefix: str = "") -> int:
        """Returns the elements of the tensors whose names start with `prefix`."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if name.startswith(prefix))

    @property
    def root(self) -> int:
        """Elements outside the blocks."""
        return self.numel() - sum(self.numel(f"{block}.") for block in self.blocks)

    @property
    def last_of_root(self) -> int:
        """Elements of the last matrix of the root."""
        outside = [name for name in self.parameters if not name.startswith(tuple(f"{block}." for block in self.blocks))]
        return [math.prod(self.parameters[name]) for name in outside if len(self.parameters[name]) > 1][-1]

    @property
    def largest_block(self) -> int:
        """Elements of the largest block."""
        return max(self.numel(f"{block}.") for block in self.blocks)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(math.prod, self.parameters.values()))


@dataclass(frozen=True)
class Peak:
    """Elements of each term at the worst moment, and the `bytes` of all terms."""

    terms: Mapping[str, float]
    element_bytes: int = 4
    moment: str = field(default="")

    @property
    def bytes(self) -> int:
        """Bytes of all terms."""
        return int(sum(self.terms.values()) * self.element_bytes)


def worst(always: Mapping[str, float], moments: Mapping[str, Mapping[str, float]]) -> Peak:
    """Returns the memory that is always held, plus the largest addition of any moment."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Peak({**always, **moments[moment]}, moment=moment)


def none(model: Shapes, *, states: int = 2, accumulation: int = 1) -> Peak:
    """Predicts strategy `none`: parameters, and for each one `states` tensors of optimizer state and a gradient.

    autograd stores a gradient without a copy (torch/csrc/autograd/functions/accumulate_grad.h). The two gradients of a
    tied table meet at the end of the backward, after activations are freed, and their sum is a third tensor
    (input_buffer.cpp). Under accumulation, later gradients exist in addition to the accumulated ones.
    """
    size = model.numel()
    extra = _making(model) - (_head(model) if model.tied and accumulation == 1 else 0)
    return worst(
        {"parameters": size, "optimizer": states * size},
        {
            "end of backward": {
                "gradients": size,
                "gradients in the making": extra if model.tied or accumulation > 1 else 0,
            }
        },
    )


def ddp(model: Shapes, *, states: int = 2) -> Peak:
    """Predicts `ddp`: like `none`, but gradients live in DDP's buckets, which exist from construction on.

    autograd creates each gradient, and DDP copies it into its bucket (torch/csrc/distributed/c10d/reducer.cpp,
    mark_variable_ready_dense). Accumulation adds up in the buckets, too, because our step zeroes gradients in place.
    """
    size = model.numel()
    moments = {"end of backward": {"gradients in the making": _making(model)}}
    return worst({"parameters": size, "optimizer": states * size, "buckets": size}, moments)


def _head(model: Shapes) -> int:
    return math.prod(model.parameters[model.head])


def _making(model: Shapes) -> int:
    """Returns the largest temporary gradients: two of a tied table and their sum, or that of the largest tensor."""
    return max(model.largest, 3 * _head(model) if model.tied else 0)


def fsdp(
    model: Shapes,
    *,
    shards: int,
    states: int = 2,
    reshard: bool = True,
    accumulation: int = 1,
    every: bool = False,
    gloo: bool = True,
) -> Peak:
    """Predicts `fsdp`: shards of parameters, optimizer state and gradients, the gathered root, and a gathered block.

    The root stays gathered from the forward to the end of the backward, a block while it computes. From
    torch/distributed/fsdp/_fully_shard: the flat buffer of an all-gather exists together with the tensors copied out of
    it until the copy ends. In the backward the next block is gathered before the current one computes
    (_backward_prefetch). The flat input of a reduce-scatter lives until the next one (reduce_scatter_states). The root
    is reduced last, after its gathered parameters are freed; a loop variable still holds its last gradient
    (foreach_reduce).
    """
    size, root, block = model.numel(), model.root, model.largest_block
    head = math.prod(model.parameters[model.head])
    blocks = size - root
    count = len(model.blocks)
    unsharded = accumulation > 1 and not every
    root_gradients = max(_making(model), root) if model.tied else root
    moments: dict[str, dict[str, float]] = {}
    if unsharded:
        moments["last backward, second block"] = {
            "accumulated, unsharded": size - block,
            "gradient shards": block / shards,
            "gathered root": root,
            "head's gradient": head if model.tied else 0,
            "gathered block": block,
            "next block gathered": block if reshard else blocks - block,
            "reduce-scatter input": block,
            "activations": model.activations,
        }
    elif reshard:
        moments["backward of the second block"] = {
            "gradient shards": (size if accumulation > 1 else blocks - 2 * block) / shards,
            "gathered root": root,
            "head's gradient": head,
            "gathered block": block,
            "next block gathered": block,
            "block's gradients": block,
            "reduce-scatter input": block,
            "activations of two blocks": 2 * model.activations / count,
        }
        moments["end of backward"] = {
            "gradient shards": (size if accumulation > 1 else blocks) / shards,
            "gathered root": root,
            "root's gradients": root_gradients,
            "reduce-scatter input": block,
        }
    else:
        moments["backward of the last block but one"] = {
            "gradient shards": (size if accumulation > 1 else block) / shards,
            "gathered root": root,
            "head's gradient": head,
            "gathered blocks": blocks - (block if count > 1 else 0),
            "block's gradients": block,
            "reduce-scatter input": block if count > 1 else 0,
            "activations": model.activations,
        }
        moments["end of backward"] = {
            "gradient shards": blocks / shards,
            "gathered root": root,
            "root's gradients": root_gradients,
            "reduce-scatter input": block,
        }
    moments["root reduced"] = {
        "gradient shards": (blocks if accumulation == 1 or unsharded else size) / shards,
        "root's new shard": root / shards,
        "reduce-scatter input": root,
        "gloo's copy of it": root if gloo else 0,
        "root's last gradient": model.last_of_root,
    }
    if accumulation > 1:
        moments["forward of a later micro-batch"] = {
            "gradients": size if unsharded else size / shards,
            "root's flat buffer": root,
            "gathered root": root,
            "first block gathered": block,
            "gloo's copy of it": block if gloo else 0,
        }
    return worst({"parameters": size / shards, "optimizer": states * size / shards}, moments)


def zero(model: Shapes, *, stage: int, ranks: int, bucket: int, states: int = 2, gloo: bool = True) -> Peak:
    """Predicts `deepspeed`. `bucket` is in elements.

    Stages 1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py, fp32): all parameters are flat. This rank's partition also
    serves as its masters (`share_masters`; DeepSpeed alone would clone it) and has the rank's optimizer state. Stage 1
    keeps every gradient until the end of the backward, including the last sum of a tied table, and allocates copies of
    the gradients in its partition at the first reduction that has one. Stage 2 keeps the reduced gradients that touch
    its partition, unsharded. Gradients pass through a bucket, which stage 2 copies while it is reduced. The step
    flattens the partition's gradients once more, then gathers all parameters in place. gloo makes a flat copy of them
    (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, AllgatherWork); NCCL does not.
    Stage 3: partitions of parameters, which are the masters, of optimizer state and of gradients (`_stage_three`).
    """
    size = model.numel()
    part = size / ranks
    if stage == 3:
        moments = _stage_three(model, ranks, bucket, gloo)
        return worst({"parameters": part, "optimizer": states * part, "gradients": part}, moments)
    moments = {"gather after the step": {"gloo's copy": size if gloo else 0}}
    if stage == 1:
        moments["end of backward"] = {
            "gradients": size,
            "bucket": bucket,
            "in the making": _making(model) - _head(model),
        }
        last = _owned(model, ranks)[-1]  # reduced alone if it exceeds the bucket, else as part of it
        moments["first reduction"] = {
            "gradients": size - (0 if last.size > bucket else min(bucket, size)),
            "bucket": bucket,
            "partition's gradients, copied": max(_in_partition(model, ranks)[rank] for rank in last.ranks),
        }
        moments["step"] = {"gradients, flat": 2 * part}
    else:
        held, copy = max(_in_partition(model, ranks)), min(bucket, size)
        kept = held * (1 - copy / size)
        moments["last bucket reduced"] = {"gradients": kept, "bucket": bucket, "bucket's copy": copy}
        moments["end of backward"] = {"gradients": kept, "bucket": bucket, "in the making": _making(model)}
        moments["step"] = {"gradients": held, "gradients, flat": part}
    return worst({"parameters": size, "optimizer": states * part}, moments)


def _stage_three(model: Shapes, ranks: int, bucket: int, gloo: bool) -> dict[str, dict[str, float]]:
    """Returns the memory at each reduction of a bucket, in the order of the backward.

    Gradients stay as autograd created them until the next one would not fit (stage3.py, with contiguous_gradients off).
    They are then copied together, unless there is only one (coalesced_collectives.py, reduce_scatter_coalesced), and
    gloo reduces a copy of the result (ProcessGroupGloo.cpp, _reduce_scatter_base); NCCL does not copy. The gradient of
    a tied head waits for the gradient of the table, which comes last. The prefetcher decides which parameters are
    gathered (`zero_gathers`), and the strategy limits them to the largest module plus a bucket. Each of gloo's two
    threads holds a copy of what it gathers. The table stays gathered to the end, because its indices need no gradient,
    which would make DeepSpeed release it.
    """
    head = _head(model)
    sizes = {name: math.prod(shape) for name, shape in model.parameters.items()}
    backward = [*([model.head] if model.tied else ()), *reversed(sizes)]
    uses = [*reversed(backward), *backward]
    gathered = zero_gathers.play(uses, sizes, bucket=bucket, bound=model.largest + bucket)[-len(sizes) :]
    waiting: list[int] = []
    moments: dict[str, dict[str, float]] = {}

    def reduce(before: str, gradient: int, held: int, in_flight: int) -> None:
        filled = sum(waiting)
        alone = len(waiting) == 1 and filled % ranks == 0
        moments[f"reduction before {before}"] = {
            "bucket's gradients": filled,
            "next gradient": gradient,
            "copied together": 0 if alone else filled,
            "gloo's copy": filled if gloo else 0,
            "tied head's gradient": head if model.tied and before not in (model.head, "the end") else 0,
            "gathered parameters": held,
            "gloo's copies of them": in_flight if gloo else 0,
        }
        waiting.clear()

    for (name, size), there in zip(reversed(sizes.items()), gathered, strict=True):
        if waiting and sum(waiting) + size > bucket:
            reduce(name, size, there.held, there.in_flight)
        waiting.append(size)
    reduce("the end", 0, waiting[-1], 0)
    moments["table's gradients in the making"] = {"gathered table": head, "gradients": _making(model)}
    moments["step"] = {"gradients, flat": model.numel() / ranks}
    return moments


@dataclass(frozen=True)
class _Owned:
    """A matrix, and the ranks whose flat ranges contain a part of it."""

    size: int
    ranks: range


def _owned(model: Shapes, ranks: int) -> list[_Owned]:
    """Returns the matrices in order. Vectors are left out: they form a separate group without weight decay."""
    sizes = [math.prod(shape) for shape in model.parameters.values() if len(shape) > 1]
    part = -(-sum(sizes) // ranks)
    found, start = [], 0
    for size in sizes:
        found.append(_Owned(size, range(start // part, (start + size - 1) // part + 1)))
        start += size
    return found


def _in_partition(model: Shapes, ranks: int) -> list[int]:
    """Returns for each rank the elements of the matrices that overlap its flat range."""
    owned = _owned(model, ranks)
    return [sum(one.size for one in owned if rank in one.ranks) for rank in range(ranks)]


def gpt_activations(*, tokens: int, layers: int, width: int, hidden: int) -> int:
    """Returns roughly how many elements our GPT's blocks keep for the backward.

    Per token and block: twelve vectors of the model width and four of the hidden width.
    """
    return tokens * layers * (12 * width + 4 * hidden)
