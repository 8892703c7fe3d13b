"""Compares the cost of saving and loading with plain writes and reads of the same bytes, and with torch's checkpoints.

    python benchmarks/checkpoint.py [durable load stall memory manifest] [--mib 1024] [--ranks 2] [--rounds 7]

Every rank holds `--mib` of float32 tensors of many sizes (rows of matrices, as FSDP2 shards them). In every round each
method runs once, in an order that rotates from round to round. A time runs from one barrier to the next. The table
gives medians, and the median of the ratios to the raw method of the same round.

durable   `save_checkpoint`, compared with `os.write` and `os.fsync` of the same bytes, torch's DCP, and torch.save with
          fsync
load      finding, verifying and loading a checkpoint, compared with reading the same bytes into the same tensors, and
          with reading them into a buffer of 16 MiB; from the disk (cold) and from memory (warm); in one pass, as a
          resume does, and as engine.load, which changes nothing before everything is verified
stall     how long a step waits for a save in the background, compared with copying the same bytes to preallocated
          memory on the same ranks and with torch's async save; and the time of a step with and without a save
memory    the peak memory of the process while it loads, above its memory before
manifest  the manifest of a model of 1,000 tensors saved by 1 to 1,024 simulated ranks: its size and its cost
"""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.ranks import run_ranks

KINDS = ("durable", "load", "stall", "memory", "manifest")
WIDTH = 1024
PIECE = 16 * 2**20


# ---------------------------------------------------------------------- the state and a clock


def shapes_of(mib: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Returns global shapes of about `mib` MiB per rank: matrices of 16 MiB and 4 MiB per rank, and small vectors."""
    shapes: dict[str, tuple[int, ...]] = {}
    left, number = mib * 2**20, 0
    while left > 0:
        rows = 4096 if number % 3 else 1024
        shapes[f"model/model/layer{number:03d}.weight"] = (rows * ranks, WIDTH)
        shapes[f"model/model/layer{number:03d}.bias"] = (WIDTH * ranks,)
        left -= (rows + 1) * WIDTH * 4
        number += 1
    return shapes


def parts_of(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict[str, Any]:
    """Returns this rank's rows of every tensor."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn((s[0] // ranks, *s[1:]), generator=generator) for name, s in shapes.items()}


def shards_of(shapes: dict[str, tuple[int, ...]], parts: dict[str, Any], rank: int) -> list[Any]:
    """Returns the same rows as canonical boxes."""
    from disttrain.checkpoint import Box, Shard

    return [
        Shard(name, shapes[name], Box((rank * len(own), *(0 for _ in own.shape[1:])), tuple(own.shape)), own)
        for name, own in parts.items()
    ]


def world() -> tuple[int, int]:
    """Starts a gloo group and returns (rank, size)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


class Ranks:
    """The process group in the form that `save_checkpoint` needs."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist, self.rank, self.size = dist, dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> Any:
        into = [None] * self.size if self.rank == 0 else None
        self._dist.gather_object(value, into)
        return into

    def broadcast(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        self._dist.barrier()


def timed(act: Callable[[], Any]) -> float:
    """Returns seconds from the start to the end of an action on all ranks. Collective."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began


def settle_disk(folder: Path | None = None) -> None:
    """Syncs the disk, and evicts the files of a folder from the page cache. Collective."""
    import torch.distributed as dist

    os.sync()
    dist.barrier()
    for path in sorted(folder.rglob("*")) if folder is not None and dist.get_rank() == 0 else ():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


def rotated(names: list[str], turn: int) -> list[str]:
    """Returns the names, rotated by `turn`."""
    turn %= len(names)
    return names[turn:] + names[:turn]


def raw_bytes(tensor: Any) -> memoryview:
    """Returns the bytes of a contiguous tensor, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


# ---------------------------------------------------------------------- durable


def write_raw(folder: Path, rank: int, parts: dict[str, Any]) -> None:
    """Writes every byte, then syncs the file and its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{rank}.raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in parts.values():
        rest = raw_bytes(tensor)
        while rest:
            rest = rest[os.write(descriptor, rest[:PIECE]) :]
    os.fsync(descriptor)
    os.close(descriptor)
    place = os.open(folder, os.O_RDONLY)
    os.fsync(place)
    os.close(place)


def dtensors(shapes: dict[str, tuple[int, ...]], parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the same state in the form that DCP needs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Cut

    mesh = init_device_mesh("cpu", (Ranks().size,))
    return {name: DTensor.from_local(own, mesh, [Cut(0)], run_check=False) for name, own in parts.items()}


def save_torch(folder: Path, rank: int, parts: dict[str, Any]) -> None:
    """Saves the tensors of a rank with torch.save and syncs the file."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{rank}.pt").open("wb") as file:
        torch.save(parts, file)
        file.flush()
        os.fsync(file.fileno())


def durable(mib: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Returns seconds until everything is on the disk. Collective."""
    rank, size = world()
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from disttrain.checkpoint import save_checkpoint

    shapes = shapes_of(mib, size)
    parts = parts_of(shapes, rank, size)
    shards, ranks, cut = shards_of(shapes, parts, rank), Ranks(), dtensors(shapes, parts)
    root = Path(folder)
    acts: dict[str, Callable[[int], Any]] = {
        "raw": lambda turn: write_raw(root / f"raw-{turn}", rank, parts),
        "disttrain": lambda turn: save_checkpoint(root / "ours", turn + 1, shards, {}, ranks),
        "DCP": lambda turn: dcp.save(cut, checkpoint_id=root / f"dcp-{turn}"),
        "torch.save": lambda turn: save_torch(root / f"torch-{turn}", rank, parts),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(-1, rounds):
        for name in rotated(list(acts), turn):
            settle_disk()
            took = timed(lambda name=name, turn=turn: acts[name](turn + 1))  # type: ignore[misc]
            if turn >= 0:
                found[name].append(took)
            dist.barrier()
            if rank == 0:
                for path in root.iterdir():
                    shutil.rmtree(path)
            dist.barrier()
    return found


# ---------------------------------------------------------------------- load


def load(mib: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Returns seconds until the tensors of this rank hold the saved values. Collective."""
    rank, size = world()
    import torch
    import torch.distributed.checkpoint as dcp

    from disttrain.checkpoint import newest_intact, save_checkpoint

    shapes = shapes_of(mib, size)
    parts = parts_of(shapes, rank, size)
    shards, ranks, cut = shards_of(shapes, parts, rank), Ranks(), dtensors(shapes, parts)
    root = Path(folder)
    path = save_checkpoint(root / "ours", 1, shards, {}, ranks)
    dcp.save(cut, checkpoint_id=root / "dcp")
    want = {name: own.clone() for name, own in parts.items()}

    def read(views: Iterable[memoryview]) -> None:
        with (path / f"rank-{rank:05d}.safetensors").open("rb", buffering=0) as file:
            for view in views:
                while view and (got := file.readinto(view)):
                    view = view[got:]

    def read_raw() -> None:
        read(raw_bytes(own) for own in parts.values())

    def read_and_drop() -> None:
        buffer = memoryview(bytearray(PIECE))
        read(buffer for _ in range(0, mib * 2**20, PIECE))

    def resume() -> None:
        found, rejected = newest_intact(root / "ours", ranks, lambda one: _fill(one, shards))
        assert found is not None and not rejected

    def verify_and_load() -> None:
        found, rejected = newest_intact(root / "ours", ranks)
        assert found is not None and not rejected
        _fill(found, shards)

    acts: dict[str, Callable[[], Any]] = {
        "raw": read_raw,
        "read into a buffer": read_and_drop,
        "disttrain, a resume": resume,
        "disttrain, engine.load": verify_and_load,
        "DCP, which verifies nothing": lambda: dcp.load(cut, checkpoint_id=root / "dcp"),
    }
    found: dict[str, list[float]] = {f"{name}, {how}": [] for how in ("cold", "warm") for name in acts}
    for turn in range(-1, rounds):
        for how in ("cold", "warm"):
            for name in rotated(list(acts), turn):
                settle_disk(root if how == "cold" else None)
                if how == "warm":
                    acts[name]()
                for own in parts.values():
                    own.zero_()
                took = timed(acts[name])
                assert "read" in name or name == "raw" or all(torch.equal(own, want[key]) for key, own in parts.items())
                if turn >= 0:
                    found[f"{name}, {how}"].append(took)
    return found


def _fill(checkpoint: Any, shards: list[Any]) -> None:
    checkpoint.load_into(shards)


# ---------------------------------------------------------------------- stall


def stall(mib: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Returns seconds that the loop waits for a save in the background, and of a step during a save. Collective."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import nn

    import disttrain
    from disttrain.data import MicroBatch

    size = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    layers = max(1, mib * size // (3 * 16))  # per layer a parameter and two moments of 16 MiB each, over all ranks

    def make_model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))

    def objective(model: Any, batch: Any) -> Any:
        return model(batch).square().sum(), len(batch)

    def step() -> None:
        engine.accumulate("model", [MicroBatch(inputs, engine.rank, True, len(inputs))], objective)
        engine.step()
        engine.log()

    config = {
        "run": {"name": "stall", "dir": folder, "steps": 10**6},
        "strategy": {"name": "fsdp"},
        "checkpoint": {"every": 10**6, "background": True, "keep_last": 1, "at_end": False},
        "report": {"every": 10**6, "progress": False, "plot": False},
    }
    found: dict[str, list[float]] = {
        name: [] for name in ("copy", "disttrain", "DCP async", "step alone", "step during a save")
    }
    with disttrain.Engine(config) as engine:
        engine.prepare("model", make_model, lambda own: torch.optim.AdamW(own, lr=1e-4, fused=True))
        engine.resume()
        inputs = torch.randn(32, 2048)
        model, optimizer = engine._prepared["model"].model, engine._prepared["model"].optimizer
        step()
        live = [p.to_local() for p in model.parameters()]
        live += [v.to_local() for s in optimizer.state.values() for v in s.values() if v.dim()]
        kept = [torch.empty_like(own) for own in live]
        group = dist.new_group(backend="gloo")

        def steps_during_save() -> list[float]:
            """Returns the times of steps during a save. The last step sees its end."""
            times = [timed(step)]
            while agree(engine._state.saver.under_way):
                times.append(timed(step))
            return times

        for turn in range(-1, rounds):
            alone = [timed(step) for _ in range(3)]
            times: dict[str, float] = {}
            for name in rotated(["copy", "disttrain", "DCP async"], turn):
                settle_disk()
                if name == "copy":
                    times[name] = timed(lambda: [a.copy_(b) for a, b in zip(kept, live, strict=True)])
                elif name == "disttrain":
                    times[name] = timed(lambda: engine._state.saver.begin(engine._state.snapshot()))
                    during = steps_during_save()
                    engine._state.saver.wait()
                else:
                    state = {"model": model.state_dict(), "optim": _named(model, optimizer)}
                    where, pending = Path(folder) / f"dcp-{turn}", []
                    asked = {"checkpoint_id": where, "process_group": group}
                    times[name] = timed(
                        lambda state=state, asked=asked, pending=pending: pending.append(  # type: ignore[misc]
                            dcp.async_save(state, **asked)
                        )
                    )
                    pending[0].result()
                    dist.barrier()
                    if engine.rank == 0:
                        shutil.rmtree(where)
            if turn >= 0:
                for name, took in times.items():
                    found[name].append(took)
                found["step alone"].append(statistics.median(alone))
                found["step during a save"].append(statistics.median(during))
    return found


def _named(model: Any, optimizer: Any) -> dict[str, Any]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, own in optimizer.state.items() for key, value in own.items()}


def agree(mine: bool) -> bool:
    """Returns whether `mine` is true on all ranks. Collective."""
    import torch
    import torch.distributed as dist

    answer = torch.tensor(int(mine))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


# ---------------------------------------------------------------------- memory


def memory(mib: int, folder: str) -> dict[str, float]:
    """Returns the peak memory in MiB while the process loads, above its memory before. Collective."""
    rank, size = world()
    from disttrain.checkpoint import newest_intact, save_checkpoint

    shapes = shapes_of(mib, size)
    parts = parts_of(shapes, rank, size)
    shards, ranks = shards_of(shapes, parts, rank), Ranks()
    save_checkpoint(Path(folder) / "ours", 1, shards, {}, ranks)
    newest_intact(Path(folder) / "ours", ranks)  # allocates everything that is allocated once
    before = resident()
    newest_intact(Path(folder) / "ours", ranks, lambda one: _fill(one, shards))
    return {"state": mib, "above it": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def resident() -> float:
    """Returns the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


# ---------------------------------------------------------------------- manifest


def manifest(most: int, tensors: int = 1000) -> Iterator[str]:
    """Yields rows for up to `most` ranks.

    A row has the number of ranks, the size of the manifest in KiB, the seconds of rank 0 to unpickle, combine and
    encode all plans, the seconds of a reader to decode the manifest, and the seconds of rank 0 at the next save for its
    digest and those of all ranks.
    """
    import torch

    from disttrain.checkpoint import Box, Manifest, Shard
    from disttrain.checkpoint.form.manifest import FileInfo, decode_manifest, encode_manifest
    from disttrain.checkpoint.form.tensor_bytes import Entry
    from disttrain.checkpoint.write.save import PlanCache
    from disttrain.checkpoint.write.write_plan import combine_plans, plan_digest

    for layout in ("each tensor cut over all ranks", "each tensor on one rank"):
        for ranks in (one for one in (1, 8, 64, 512, 1024) if one <= most):
            plans: list[list[Entry]] = [[] for _ in range(ranks)]
            for number in range(tensors):
                name = f"model/model/layer{number:04d}.weight"
                if layout.startswith("each tensor cut"):
                    for rank in range(ranks):
                        plans[rank].append(Entry(name, (1024, 256), torch.float32, _rows(rank, ranks)))
                else:
                    plans[number % ranks].append(Entry(name, (1024, 256), torch.float32, Box((0, 0), (1024, 256))))
            files = {f"rank-{rank:05d}.safetensors": FileInfo(1, (0,)) for rank in range(ranks) if plans[rank]}
            told = [pickle.dumps(plan) for plan in plans]
            began = time.perf_counter()
            plans = [pickle.loads(one) for one in told]
            read = time.perf_counter()
            infos = combine_plans([], plans)
            judged = time.perf_counter()
            raw = encode_manifest(Manifest(1, 2**24, infos, files, {}))
            encoded = time.perf_counter()
            decode_manifest(raw, where="bench")
            decoded = time.perf_counter()
            own = [Shard(e.name, e.shape, e.box, torch.empty(0)) for e in plans[0]]
            memory, digests = PlanCache(), [bytes(32)] * ranks
            memory.keep([pickle.loads(pickle.dumps(one)) for one in digests], infos)
            again = time.perf_counter()
            plan_digest(own, 0)
            assert memory.recall(digests) is not None
            took = read - began, judged - read, encoded - judged, decoded - encoded, time.perf_counter() - again
            yield f"| {layout} | {ranks} | {len(raw) / 1024:.0f} | " + " | ".join(f"{one:.3f}" for one in took) + " |"


def _rows(rank: int, ranks: int) -> Any:
    from disttrain.checkpoint import Box

    return Box((rank * (1024 // ranks), 0), (1024 // ranks, 256))


# ---------------------------------------------------------------------- tables


def print_times(title: str, found: list[dict[str, list[float]]], base: Callable[[str], str]) -> None:
    """Prints a table with medians of the slowest rank, and of the ratios to the base of the same round."""
    worst = {name: [max(times) for times in zip(*(one[name] for one in found), strict=True)] for name in found[0]}
    print(f"\n{title}\n\n| | seconds | ratio | spread of the ratio |\n|---|---:|---:|---|")
    for name, times in worst.items():
        ratios = [own / raw for own, raw in zip(times, worst[base(name)], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {statistics.median(times):.3f} | {statistics.median(ratios):.2f} | {spread} |", flush=True)


def main() -> None:
    """Runs the comparisons and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(KINDS))
    parser.add_argument("--mib", type=int, default=1024, help="MiB of state per rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--simulated", type=int, default=1024, help="number of ranks of the largest manifest")
    parser.add_argument("--dir", help="folder to write to")
    given = parser.parse_args()
    unknown = sorted(set(given.what) - set(KINDS))
    if unknown:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    title = f"{given.mib} MiB per rank, {given.ranks} ranks, medians of {given.rounds} rounds"
    for what in given.what:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            if what == "durable":
                found = run_ranks(given.ranks, durable, given.mib, given.rounds, folder)
                print_times(f"durable: {title}", found, lambda name: "raw")
            elif what == "load":
                found = run_ranks(given.ranks, load, given.mib, given.rounds, folder)
                print_times(f"load: {title}", found, lambda name: f"raw, {name.rsplit(', ', 1)[1]}")
            elif what == "stall":
                found = run_ranks(given.ranks, stall, given.mib, given.rounds, folder)
                print_times(f"stall: {title}", found, lambda name: "step alone" if "step" in name else "copy")
            elif what == "memory":
                print("\n| rank | state, MiB | above the state, MiB |\n|---|---:|---:|")
                for rank, one in enumerate(run_ranks(given.ranks, memory, given.mib, folder)):
                    print(f"| {rank} | {one['state']:.0f} | {one['above it']:.1f} |")
            else:
                print("\n| | ranks | KiB | unpickle, s | combine, s | encode, s | decode, s | next save, s |")
                print("|---|---:|---:|---:|---:|---:|---:|---:|")
                for row in manifest(given.simulated):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
