"""Memory of one rank at the worst moment of a training step, from shapes and settings alone: pure, without torch.

Written down from torch's and DeepSpeed's sources before anything was measured; `memory.py` measures against it, and
`docs/measurements/memory.md` records the result. Counts tensors in elements of the master dtype: parameters, masters, optimizer
state, gradients, gathered groups, buckets; and activations in those of fsdp's moments at which they are alive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import zero_gathers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """A model's trainable tensors, each once under its first name. `blocks` are prefixes of names, in the order of the
    forward; what lies in none of them is the root. `head` is the tensor that makes logits; where it is `tied` it is
    the token table too, and gets a gradient from both ends of the backward. `activations` are elements, all blocks'."""

    parameters: Mapping[str, Shape]
    blocks: Sequence[str]
    head: str
    tied: bool
    activations: int = 0

    def numel(self, prefix: str = "") -> int:
        """Elements of the tensors whose names begin so."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if name.startswith(prefix))

    @property
    def root(self) -> int:
        """Elements outside the blocks."""
        return self.numel() - sum(self.numel(f"{block}.") for block in self.blocks)

    @property
    def last_of_root(self) -> int:
        """Elements of the root's last tensor that is no vector."""
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
    """Elements of each part at the worst moment, and `bytes` of all."""

    terms: Mapping[str, float]
    element_bytes: int = 4
    moment: str = field(default="")

    @property
    def bytes(self) -> int:
        """All terms."""
        return int(sum(self.terms.values()) * self.element_bytes)


def worst(always: Mapping[str, float], moments: Mapping[str, Mapping[str, float]]) -> Peak:
    """What is held always, and the most that any moment adds to it."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Peak({**always, **moments[moment]}, moment=moment)


def none(model: Shapes, *, states: int = 2, accumulation: int = 1) -> Peak:
    """Parameters, `states` tensors of optimizer state each, and a gradient each.

    autograd hands its gradient over without a copy (torch/csrc/autograd/functions/accumulate_grad.h). A tied table's
    two gradients meet at the end of the backward, when activations are gone, and their sum is a third tensor
    (input_buffer.cpp). An accumulation's later gradients are made beside those that they are added to.
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
    """`none`, with gradients that live in DDP's buckets (gradient_as_bucket_view), which exist from construction on.

    Each gradient is made by autograd, then copied into its bucket (torch/csrc/distributed/c10d/reducer.cpp,
    mark_variable_ready_dense). An accumulation adds up there too: our step zeroes gradients where they lie.
    """
    size = model.numel()
    moments = {"end of backward": {"gradients in the making": _making(model)}}
    return worst({"parameters": size, "optimizer": states * size, "buckets": size}, moments)


def _head(model: Shapes) -> int:
    return math.prod(model.parameters[model.head])


def _making(model: Shapes) -> int:
    """Gradients outside their place at once: a tied table's two and their sum, or the largest tensor's."""
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
    """Shards of parameters, optimizer state and gradients; the root whole from forward to the backward's end; a block
    whole while it computes.

    torch/distributed/fsdp/_fully_shard: an all-gather's flat buffer lives beside the tensors copied out of it, until
    after the copy; in the backward the next block's is gathered before this one computes (_backward_prefetch); a
    reduce-scatter's flat input lives until the next one (reduce_scatter_states). The root is reduced last, when its
    whole parameters are gone; a loop's variable still names its last gradient (foreach_reduce).
    """
    size, root, block = model.numel(), model.root, model.largest_block
    head = math.prod(model.parameters[model.head])
    blocks = size - root
    count = len(model.blocks)
    whole = accumulation > 1 and not every
    root_gradients = max(_making(model), root) if model.tied else root
    moments: dict[str, dict[str, float]] = {}
    if whole:
        moments["last backward, second block"] = {
            "accumulated whole": size - block,
            "gradient shards": block / shards,
            "root whole": root,
            "head's gradient": head if model.tied else 0,
            "block whole": block,
            "next block gathered": block if reshard else blocks - block,
            "reduce-scatter input": block,
            "activations": model.activations,
        }
    elif reshard:
        moments["backward of the second block"] = {
            "gradient shards": (size if accumulation > 1 else blocks - 2 * block) / shards,
            "root whole": root,
            "head's gradient": head,
            "block whole": block,
            "next block gathered": block,
            "block's gradients": block,
            "reduce-scatter input": block,
            "activations of two blocks": 2 * model.activations / count,
        }
        moments["end of backward"] = {
            "gradient shards": (size if accumulation > 1 else blocks) / shards,
            "root whole": root,
            "root's gradients": root_gradients,
            "reduce-scatter input": block,
        }
    else:
        moments["backward of the last block but one"] = {
            "gradient shards": (size if accumulation > 1 else block) / shards,
            "root whole": root,
            "head's gradient": head,
            "blocks whole": blocks - (block if count > 1 else 0),
            "block's gradients": block,
            "reduce-scatter input": block if count > 1 else 0,
            "activations": model.activations,
        }
        moments["end of backward"] = {
            "gradient shards": blocks / shards,
            "root whole": root,
            "root's gradients": root_gradients,
            "reduce-scatter input": block,
        }
    moments["root reduced"] = {
        "gradient shards": (blocks if accumulation == 1 or whole else size) / shards,
        "root's new shard": root / shards,
        "reduce-scatter input": root,
        "gloo's copy of it": root if gloo else 0,
        "root's last gradient": model.last_of_root,
    }
    if accumulation > 1:
        moments["forward of a later micro-batch"] = {
            "gradients": size if whole else size / shards,
            "root gathered": root,
            "root whole": root,
            "first block gathered": block,
            "gloo's copy of it": block if gloo else 0,
        }
    return worst({"parameters": size / shards, "optimizer": states * size / shards}, moments)


def zero(model: Shapes, *, stage: int, ranks: int, bucket: int, states: int = 2, gloo: bool = True) -> Peak:
    """Flat partitions; `bucket` is in elements.

    Stages 1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py, fp32): all parameters flat, of which this rank's partition
    is its masters too (`share_masters`; DeepSpeed alone would clone it), and its optimizer state. Stage 1 keeps every
    gradient until the backward's end, the tied table's last sum among them, and makes room for copies of those of its
    partition at the first reduction that has one; stage 2 those that lie in this partition,
    in whole, of what was reduced before. Gradients go through a bucket, which stage 2 copies while it is reduced. The
    step flattens the partition's gradients once more, then gathers all parameters in place, of which gloo makes a flat
    copy (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, AllgatherWork; NCCL does not).
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
        last = _owned(model, ranks)[-1]  # reduced alone where no bucket holds it, else out of the bucket
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
    """What each reduction of a bucket meets, in the order of the backward.

    Gradients wait as autograd made them until the next one would not fit (stage3.py, with contiguous_gradients off);
    they are then copied together, unless one is alone (coalesced_collectives.py, reduce_scatter_coalesced), and gloo
    reduces a copy of that (ProcessGroupGloo.cpp, _reduce_scatter_base; NCCL does not). A tied head's gradient waits for
    the table's, last of all. Whole parameters are the prefetcher's (`zero_gathers`), bounded by the strategy to a
    bucket more than the largest module; each of gloo's two threads holds a copy of what it is gathering. The table is
    whole to the end, for its indices need no gradient that would tell DeepSpeed to let it go.
    """
    head = _head(model)
    sizes = {name: math.prod(shape) for name, shape in model.parameters.items()}
    backward = [*([model.head] if model.tied else ()), *reversed(sizes)]
    uses = [*reversed(backward), *backward]
    whole = zero_gathers.play(uses, sizes, bucket=bucket, bound=model.largest + bucket)[-len(sizes) :]
    waiting: list[int] = []
    moments: dict[str, dict[str, float]] = {}

    def reduce(before: str, gradient: int, held: int, on_their_way: int) -> None:
        filled = sum(waiting)
        alone = len(waiting) == 1 and filled % ranks == 0
        moments[f"reduction before {before}"] = {
            "bucket's gradients": filled,
            "next gradient": gradient,
            "copied together": 0 if alone else filled,
            "gloo's copy": filled if gloo else 0,
            "tied head's gradient": head if model.tied and before not in (model.head, "the end") else 0,
            "whole parameters": held,
            "gloo's copies of them": on_their_way if gloo else 0,
        }
        waiting.clear()

    for (name, size), there in zip(reversed(sizes.items()), whole, strict=True):
        if waiting and sum(waiting) + size > bucket:
            reduce(name, size, there.held, there.on_their_way)
        waiting.append(size)
    reduce("the end", 0, waiting[-1], 0)
    moments["table's gradients in the making"] = {"table whole": head, "gradients": _making(model)}
    moments["step"] = {"gradients, flat": model.numel() / ranks}
    return moments


@dataclass(frozen=True)
class _Owned:
    """A matrix, and the ranks in whose flat ranges a part of it lies."""

    size: int
    ranks: range


def _owned(model: Shapes, ranks: int) -> list[_Owned]:
    """The matrices in their order. Vectors, a group of their own without weight decay, are left out."""
    sizes = [math.prod(shape) for shape in model.parameters.values() if len(shape) > 1]
    part = -(-sum(sizes) // ranks)
    found, start = [], 0
    for size in sizes:
        found.append(_Owned(size, range(start // part, (start + size - 1) // part + 1)))
        start += size
    return found


def _in_partition(model: Shapes, ranks: int) -> list[int]:
    """For each rank, elements of the matrices that lie in its flat range, in part at least."""
    owned = _owned(model, ranks)
    return [sum(one.size for one in owned if rank in one.ranks) for rank in range(ranks)]


def gpt_activations(*, tokens: int, layers: int, width: int, hidden: int) -> int:
    """Elements that our GPT's blocks keep for their backward, roughly: per token and block some twelve vectors of the
    width and four of the hidden width."""
    return tokens * layers * (12 * width + 4 * hidden)
