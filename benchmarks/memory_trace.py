"""Traces the memory of this process's tensors on a CPU, as torch's CPU allocator reports it.

At each allocation and release, the allocator reports its total to the profiler (c10/core/CPUAllocator.cpp). The total
includes memory that no Python object shows, such as autograd's buffers. By default it counts the profiled threads only,
but a gloo thread is often the last to release a tensor. A flag of c10 makes it count all threads. Memory that gloo
allocates itself is not torch's and is not seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def count_every_thread() -> None:
    """Makes torch's CPU allocator count all threads from now on. Earlier allocations are not counted. Local."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_report_cpu_memory_usage").value = True


@dataclass(frozen=True)
class Window:
    """Allocated bytes at the start and end of a part of the program, and their peak in between."""

    begin_bytes: int
    end_bytes: int
    peak_bytes: int


class MemoryTrace:
    """Traces what runs inside `with trace:`. `trace.part(name)` marks a part of it.

    Local. The process must have called `count_every_thread` before.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._windows: dict[str, Window] = {}

    def __enter__(self) -> MemoryTrace:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        acts, parts = [], {}
        for event in _all(self._profile.profiler.kineto_results.experimental_event_tree()):
            if event.tag.name == "Allocation":
                fields = event.extra_fields
                acts.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
            elif event.name.startswith("part:"):
                parts[event.name.removeprefix("part:")] = event.start_time_ns, event.end_time_ns
        for name, (begin_ns, end_ns) in parts.items():
            inside = [act for act in sorted(acts) if begin_ns <= act[0] <= end_ns]
            _, first, size = inside[0]
            given = [total for _, total, _ in inside]
            self._windows[name] = Window(first - size, given[-1], max(given))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Marks a part, whose memory `window(name)` returns."""
        with record_function(f"part:{name}"):
            torch.empty(1)  # an allocation at the start and at the end reports the total
            yield
            torch.empty(1)

    def window(self, name: str) -> Window:
        """Returns the memory of a part, once the trace has ended."""
        return self._windows[name]


def _all(events: Iterable[Any]) -> Iterator[Any]:
    left = list(events)
    while left:
        event = left.pop()
        yield event
        left += event.children
