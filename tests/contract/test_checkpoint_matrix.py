"""Every strategy loads the checkpoints of every other, bit-equal, and the losses continue unchanged.

CI runs every saver and every loader at least once, at mixed sizes. `-m slow -s` runs every cell and prints the table of
docs/measurements/checkpoint-proof.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from contract.checkpoint_cells import (
    LOADERS,
    SAVED,
    SAVERS,
    STRATEGIES,
    Found,
    Place,
    differences,
    load_all,
    plain_losses,
    save_all,
)
from contract.engine_runs import worst
from world import run_world

from disttrain.checkpoint import SoleRank, full_shard, save_checkpoint

BOUND = 1e-5
"""Of the losses after loading, relative. Parameters and optimizer state need none: they are equal bit for bit."""

Cell = tuple[Place, Place]

SAMPLE: list[Cell] = [
    (Place("zero3", 4), Place("ddp", 1)),
    (Place("tensor", 4), Place("zero1", 1)),
    (Place("ddp", 1), Place("fsdp", 2)),
    (Place("replicate", 4), Place("tensor", 2)),
    (Place("zero2", 2), Place("zero3", 2)),
    (Place("fsdp", 2), Place("replicate", 3)),
    (Place("zero1", 2), Place("zero2", 3)),
    (Place("fsdp", 2), Place("zero3", 3)),
    (Place("zero1", 2), Place("fsdp", 4)),
]
"""Each strategy saves and loads at least once; every size loads from other sizes."""


def test_the_sample_has_every_saver_and_every_loader() -> None:
    assert {saver.strategy for saver, _ in SAMPLE} == {loader.strategy for _, loader in SAMPLE} == set(STRATEGIES)
    assert {saver.size for saver, _ in SAMPLE} == {1, 2, 4}
    assert {loader.size for _, loader in SAMPLE} == {1, 2, 3, 4}
    assert all(saver in SAVERS and loader in LOADERS for saver, loader in SAMPLE)


def test_saved_by_one_and_loaded_into_another(tmp_path: Path) -> None:
    saved, found = run_cells(tmp_path, SAMPLE)
    assert set(found) == set(SAMPLE)
    assert not faults(saved, found), "\n".join(faults(saved, found))


def test_a_difference_of_one_bit_is_reported(tmp_path: Path) -> None:
    paths = []
    for flipped in (False, True):
        tensors = {"model/model/w": torch.ones(5), "optim/model/w:step": torch.tensor(4.0)}
        if flipped:
            tensors["optim/model/w:step"].view(torch.int32).bitwise_xor_(1)
        document = {"progress": {"steps": 4 + flipped}, "user": {}, "optim": {"model": {"groups": [], "updates": 4}}}
        shards = [full_shard(name, tensor) for name, tensor in tensors.items()]
        paths.append(save_checkpoint(tmp_path / str(flipped), SAVED, shards, document, SoleRank()))
    told, count = differences(*paths)
    assert count == 2
    assert told == ["optim/model/w:step differs in 1 bytes", "progress is {'steps': 4}, then {'steps': 5}"]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_complete_matrix(tmp_path: Path) -> None:
    cells = [(saver, loader) for loader in LOADERS for saver in SAVERS]
    saved, found = run_cells(tmp_path, cells, together=1)
    print(f"\n{table(saved, found)}")
    assert len(found) == len(SAVERS) * len(LOADERS)
    assert not faults(saved, found), "\n".join(faults(saved, found))


def run_cells(
    folder: Path, cells: Sequence[Cell], together: int = len(STRATEGIES)
) -> tuple[dict[Place, list[float]], dict[Cell, Found]]:
    """Run the cells.

    Returns the savers' losses after their checkpoint, and the result of each cell. A world saves, or loads into
    `together` strategies, one after another.
    """
    saved: dict[Place, list[float]] = {}
    savers = sorted({saver for saver, _ in cells})
    for size in sorted({saver.size for saver in savers}):
        saved |= run_world(size, save_all, folder, [one for one in savers if one.size == size], timeout_s=1200)[0]
    found: dict[Cell, Found] = {}
    for size in sorted({loader.size for _, loader in cells}):
        loaders = sorted({loader for _, loader in cells if loader.size == size})
        for some in batched(loaders, together):
            own = [cell for cell in cells if cell[1] in some]
            found |= run_world(size, load_all, folder, own, timeout_s=1200)[0]
            print(f"{', '.join(map(str, some))}: {sum(not found[cell].faults for cell in own)} of {len(own)} bit-equal")
    return saved, found


def batched(items: Sequence[Place], count: int) -> list[Sequence[Place]]:
    return [items[start : start + count] for start in range(0, len(items), count)]


def apart(saved: dict[Place, list[float]], cell: Cell, one: Found) -> float:
    """The largest relative loss difference from the saver's uninterrupted run, and from a plain loop."""
    return max(worst(one.losses, saved[cell[0]]), worst(one.losses, plain_losses()[SAVED:]))


def faults(saved: dict[Place, list[float]], found: dict[Cell, Found]) -> list[str]:
    told = [f"{place}: the saver itself is off the plain loop" for place in saved if apart_alone(saved, place) > BOUND]
    for cell, one in found.items():
        told += [f"{cell[0]}, into {cell[1]}: {fault}" for fault in one.faults]
        if apart(saved, cell, one) > BOUND:
            told.append(f"{cell[0]}, into {cell[1]}: losses {apart(saved, cell, one):.1e} apart: {one.losses}")
        if not one.tensors:
            told.append(f"{cell[0]}, into {cell[1]}: nothing was compared")
    return told


def apart_alone(saved: dict[Place, list[float]], place: Place) -> float:
    return worst(saved[place], plain_losses()[SAVED:])


def table(saved: dict[Place, list[float]], found: dict[Cell, Found]) -> str:
    """One row per saver, one column per loading strategy: the largest loss difference over the worlds it loads in."""
    lines = [
        "| saved by | " + " | ".join(f"{name} ({', '.join(map(str, at))})" for name, (_, _, at) in STRATEGIES.items()),
        "|---" * (len(STRATEGIES) + 1),
    ]
    for saver in SAVERS:
        row = [str(saver)]
        for name in STRATEGIES:
            own = {cell: one for cell, one in found.items() if cell[0] == saver and cell[1].strategy == name}
            unequal = sum(bool(one.faults) for one in own.values())
            row.append(f"{unequal} unequal" if unequal else f"{max(apart(saved, *item) for item in own.items()):.0e}")
        lines.append("| " + " | ".join(row))
    equal = sum(not one.faults for one in found.values())
    tensors = sum(one.tensors for one in found.values())
    lines = [f"{line} |" for line in lines]
    return "\n".join([*lines, "", f"{equal} of {len(found)} cells bit-equal, {tensors} tensors compared"])
