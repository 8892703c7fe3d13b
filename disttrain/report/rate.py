"""How fast a run goes: time, throughput, utilisation and memory between two reported steps.

Owns the clock. Adds no device sync and no collective: the caller has just read the loss back when it measures, which
waits for the device already.
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

# Dense peak of one device in operations a second, bf16 on tensor cores without sparsity, from the vendor's data sheets:
# A100 (2020) 312e12; H100 (2023) SXM 989.4e12, PCIe 756e12, NVL 835e12 (half the sheet's sparse figure);
# H200 (2024) SXM 989.4e12, NVL 835e12; GH200 (2023) 989.4e12; B200 (2024, HGX) 2250e12; GB200 (2024, NVL72) 2500e12;
# L40S 362e12; L4 121e12. The first entry whose words are all among the words of the device's name counts, so the
# particular come before the general; whole words, because an RTX A1000 is no A100.
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
    """Where the run stood when it was last looked at."""

    time_s: float
    samples: int
    tokens: int
    step: int


class Rate:
    """Measures from one call of `measure` to the next. Local; counts passed in are those of the whole world.

    `parameters` are those of the models trained, over all ranks; `now` is for tests.
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
        """The same; the time in which each is waited for counts as waiting for data."""
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
        """What happened since the last measure, or since `start`; means a step for the two times.

        `mfu` is None where the device's peak is unknown or nothing counts tokens. `mem_peak_bytes` is this rank's:
        tensors on the device since the last measure; on a CPU the process's resident peak since it began.
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
        """6 operations a parameter and token, forward and backward (Kaplan et al. 2020, section 2.1), over the peak.

        Attention's own products are left out, so long contexts are understated.
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
    """Operations a second of one device at its best; 0.0 where unknown."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_flops(device_name: str) -> float:
    """The table's figure for a device's name, such as `NVIDIA H100 80GB HBM3`; 0.0 where the table has none.

    A MIG slice has a part of its device's units, and its name does not say which part of the peak that is: 0.0.
    """
    found = set(re.split(r"[^A-Za-z0-9]+", device_name))
    if "MIG" in found:
        return 0.0
    return next((flops for words, flops in PEAK_FLOPS if found.issuperset(words)), 0.0)
