"""Measures time, throughput, utilization and memory between two reported steps.

Adds no device sync and no collective. The caller has just read the loss, which already waited for the device.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

Loaded = TypeVar("Loaded")

# Dense peak of one device in operations per second, bf16 on tensor cores without sparsity, from NVIDIA's data sheets:
# A100 (2020) 312e12; H100 (2023) SXM 989.4e12, PCIe 756e12, NVL 835e12 (half the sheet's sparse figure);
# H200 (2024) SXM 989.4e12, NVL 835e12; GH200 (2023) 989.4e12; B200 (2024, HGX) 2250e12; GB200 (2024, NVL72) 2500e12;
# L40S 362e12; L4 121e12. The first entry counts whose words are all words of the device's name, so specific entries
# come first. Complete words are compared, because an RTX A1000 is not an A100.
PEAK_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H200", "NVL"), 835e12),
    (("GH200",), 989.4e12),
    (("H100",), 989.4e12),
    (("H200",), 989.4e12),
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
)


@dataclass(frozen=True)
class _Mark:
    """The counts and the time of the last measurement."""

    time_s: float
    samples: int
    tokens: int
    step: int


class Rate:
    """Measures the time from one call of `measure` to the next. Local. All counts are those of all ranks together.

    Args:
        device: this rank's device.
        parameters: the number of trained parameters, over all ranks.
        world_size: the number of ranks.
        now: a clock in seconds, for tests.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        parameters: int,
        world_size: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device = torch.device(device)
        self._now = now
        self._parameters = parameters
        self._peak_flops = _peak_of(self._device) * world_size
        self._loading_s = 0.0
        self._mark: _Mark | None = None

    def start(self, *, samples: int, tokens: int, step: int) -> None:
        """Start the clock at these counts."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._loading_s = 0.0
        self._mark = _Mark(self._now(), samples, tokens, step)

    def loading(self, steps: Iterator[Loaded]) -> Iterator[Loaded]:
        """Yield the same steps. The time spent waiting for each counts as waiting for data."""
        while True:
            began = self._now()
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self._loading_s += self._now() - began
            yield step

    def measure(self, *, samples: int, tokens: int, step: int) -> dict[str, float | int | None]:
        """Return rates since the last measurement, or since `start`. The two times are means over the steps.

        `mfu` is None where the device's peak is unknown or no tokens are counted. `mem_peak_bytes` is this rank's: of
        tensors on a GPU since the last measurement, on a CPU of the process since it started.
        """
        assert self._mark is not None, "measure was called before start"
        last, here = self._mark, _Mark(self._now(), samples, tokens, step)
        elapsed_s = max(here.time_s - last.time_s, 1e-9)
        steps = max(here.step - last.step, 1)
        tokens_per_s = (here.tokens - last.tokens) / elapsed_s
        found: dict[str, float | int | None] = {
            "step_time_s": elapsed_s / steps,
            "data_time_s": self._loading_s / steps,
            "samples_per_s": (here.samples - last.samples) / elapsed_s,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "mem_peak_bytes": self._mem_peak_bytes(),
        }
        self._loading_s, self._mark = 0.0, here
        return found

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Return 6 operations per parameter and token (Kaplan et al. 2020, section 2.1), divided by the peak.

        The products within attention are not counted, so the value is too low for long contexts.
        """
        if not self._peak_flops or not tokens_per_s:
            return None
        return 6 * self._parameters * tokens_per_s / self._peak_flops

    def _mem_peak_bytes(self) -> int:
        if self._device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else resident * 1024  # macOS counts bytes, Linux KiB


def _peak_of(device: torch.device) -> float:
    """Return the peak operations per second of one device, 0.0 if unknown."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_flops(device_name: str) -> float:
    """Return the peak for a device's name, such as `NVIDIA H100 80GB HBM3`; 0.0 for a name that is not in the table.

    Also 0.0 for a MIG slice: it has a part of its device's units, and its name does not say which part.
    """
    found = set(re.split(r"[^A-Za-z0-9]+", device_name))
    if "MIG" in found:
        return 0.0
    return next((flops for words, flops in PEAK_FLOPS if found.issuperset(words)), 0.0)
