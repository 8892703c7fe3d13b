"""Memory of this process's tensors over time on a CPU: the running sum of the profiler's memory events.

torch reports every allocation and release of its CPU allocator to the profiler (c10/core/CPUAllocator.cpp), those that
no Python object shows (DDP's buckets, autograd's buffers) as well. What gloo takes for itself is not torch's: not seen.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Window:
    """Bytes above what was held when the trace began: at the start of a part of the program, at its end, at most."""

    start_bytes: int
    end_bytes: int
    peak_bytes: int


class MemoryTrace:
    """Traces what runs inside `with trace:`; `trace.part(name)` marks a part of it. Local to this process."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._events: list[Any] = []

    def __enter__(self) -> MemoryTrace:
        gc.collect()
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self._events = list(self._profile.profiler.kineto_results.events())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in here can be asked for with `window(name)`."""
        with record_function(f"part:{name}"):
            yield

    def window(self, name: str) -> Window:
        """The part of that name, once the trace has ended."""
        mark = next(event for event in self._events if event.name() == f"part:{name}")
        begin_ns, end_ns = mark.start_ns(), mark.start_ns() + mark.duration_ns()
        held = peak = start = end = 0
        for time_ns, change in self._changes():
            if time_ns < begin_ns:
                start = peak = end = held = held + change
                continue
            if time_ns > end_ns:
                break
            end = held = held + change
            peak = max(peak, held)
        return Window(start, end, peak)

    def _changes(self) -> list[tuple[int, int]]:
        """(time, bytes taken or given back), in order. A release at the very time of an allocation counts first."""
        found = [(event.start_ns(), event.nbytes()) for event in self._events if event.name() == "[memory]"]
        return sorted(found)


def live_bytes() -> int:
    """Bytes of the different storages of all tensors that Python can see."""
    gc.collect()
    plain = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    gradients = [thing.grad for thing in plain if thing.is_leaf and type(thing.grad) is torch.Tensor]
    storages = (one.untyped_storage() for one in (*plain, *gradients) if one.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
