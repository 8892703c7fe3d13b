"""Memory of this process's tensors over time on a CPU: the running sum of the profiler's memory events.

torch reports every allocation and release of its CPU allocator to the profiler (c10/core/CPUAllocator.cpp), those that
no Python object shows (autograd's buffers) as well, but only of the threads that are profiled: a tensor that one of
gloo's threads happens to let go of last seems to live on. So a part of the program counts where it gives back all that
it took, above what Python's own tensors held when it began. What gloo takes for itself is not torch's: not seen.
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
    """Bytes that a part of the program holds at its end above its start, and the most that it held meanwhile."""

    kept_bytes: int
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
        memory = [event for event in self._events if event.name() == "[memory]"]
        changes = sorted((event.start_ns(), event.nbytes()) for event in memory)
        held = peak = 0
        for time_ns, change in changes:
            if begin_ns <= time_ns <= end_ns:
                held += change
                peak = max(peak, held)
        return Window(held, peak)


def live_bytes() -> int:
    """Bytes of the different storages of all tensors that Python can see."""
    gc.collect()
    plain = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    gradients = [thing.grad for thing in plain if thing.is_leaf and type(thing.grad) is torch.Tensor]
    storages = (one.untyped_storage() for one in (*plain, *gradients) if one.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
