"""Memory of this process's tensors over time on a CPU: what torch's CPU allocator has given out, at each of its acts.

The allocator reports to the profiler (c10/core/CPUAllocator.cpp), with every act, how much it has given out in all:
what no Python object shows (autograd's buffers) as well. By itself it counts the acts of the profiled threads only, and
one of gloo's threads is often the last to let go of a tensor; a switch of c10's makes it count those of all threads.
What gloo takes for itself is not torch's: not seen.
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
    """Let torch's CPU allocator count in all threads from now on; what was made before is not counted. Local."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_report_cpu_memory_usage").value = True


@dataclass(frozen=True)
class Window:
    """Bytes given out as a part of the program begins and as it ends, and the most of them between."""

    begin_bytes: int
    end_bytes: int
    peak_bytes: int


class MemoryTrace:
    """Traces what runs inside `with trace:`; `trace.part(name)` marks a part of it. Local to this process, which has
    called `count_every_thread` first."""

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
        """What runs in here can be asked for with `window(name)`."""
        with record_function(f"part:{name}"):
            torch.empty(1)  # acts of the allocator, at the beginning and the end, that say what it has given out
            yield
            torch.empty(1)

    def window(self, name: str) -> Window:
        """The part of that name, once the trace has ended."""
        return self._windows[name]


def _all(events: Iterable[Any]) -> Iterator[Any]:
    left = list(events)
    while left:
        event = left.pop()
        yield event
        left += event.children
