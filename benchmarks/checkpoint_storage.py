"""Compares checkpoints in S3 with plain use of s3fs: seconds, and memory above the state.

    python benchmarks/checkpoint_storage.py [--mib 256] [--rounds 3]

One process saves and loads one tensor, against moto's server in a separate process on this machine. Plain use of s3fs
is a multipart upload in parts of 16 MiB, and unverified reads of ranges of 16 MiB. Every round runs all five methods in
turn. The server is the bottleneck, so the rows are comparable with each other but say nothing about a real store.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

MIB = 2**20
PART = 16 * MIB

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


class Watch(threading.Thread):
    """Records the peak resident memory of this process, above its memory at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before = self._most = self._resident()
        self._ended = threading.Event()

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self._most = max(self._most, self._resident())

    def stop(self) -> float:
        """Stops recording and returns the peak in MiB."""
        self._ended.set()
        self.join()
        return (self._most - self._before) / MIB


def acts(mib: int) -> dict[str, Callable[[], Any]]:
    """Returns the methods to measure, by name."""
    import s3fs
    import torch

    from disttrain.checkpoint import Address, Checkpoint, SoleRank, full_shard, newest_intact, prune, save_checkpoint

    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir("models")
    tensor = torch.randn(mib * MIB // 4)
    into = torch.zeros_like(tensor)
    content = memoryview(tensor.numpy()).cast("B")
    root, steps = Address("s3://models/run"), [0]

    def put() -> None:
        with system.open("models/raw", "wb", block_size=PART) as file:
            for start in range(0, len(content), PART):
                file.write(content[start : start + PART])

    def save() -> None:
        steps[0] += 1
        save_checkpoint(root, steps[0], [full_shard("model/m/w", tensor)], {}, SoleRank())

    def get() -> None:
        for start in range(0, len(content), PART):
            system.cat_file("models/raw", start=start, end=start + PART)

    def fill(checkpoint: Checkpoint) -> None:
        checkpoint.load_into([full_shard("model/m/w", into)])

    def resume() -> None:
        into.zero_()
        newest_intact(root, SoleRank(), fill)
        assert torch.equal(into, tensor)

    def load() -> None:
        into.zero_()
        fill(Checkpoint.open(root / f"step-{steps[0]:08d}"))
        assert torch.equal(into, tensor)
        prune(root, 1)

    return {"plain put": put, "save": save, "plain get": get, "resume": resume, "load": load}


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    endpoint = server.stdout.readline().splitlines()[-1]
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=endpoint)
    try:
        measured = acts(asked.mib)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
        for _ in range(asked.rounds):
            for name, act in measured.items():
                watch = Watch()
                watch.start()
                began = time.perf_counter()
                act()
                found[name].append((time.perf_counter() - began, watch.stop()))
    finally:
        server.kill()
        server.wait()
    print("| | seconds | MiB above the state |\n|---|---:|---:|")
    for name, rounds in found.items():
        seconds, above = (statistics.median(one) for one in zip(*rounds, strict=True))
        print(f"| {name} | {seconds:.2f} | {above:.0f} |")


if __name__ == "__main__":
    main()
