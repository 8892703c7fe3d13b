"""Retention keeps the newest, every nth and the best checkpoints. None is removed in favour of an unverified one."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint import Best, Retention, SoleRank, full_shard, list_checkpoints, save_checkpoint
from disttrain.checkpoint.keep.retention import choose_kept


def save(root: Path, step: int, loss: float | None = None) -> Path:
    document = {} if loss is None else {"evaluation": {"eval/held_out/loss": loss}}
    return save_checkpoint(root, step, [full_shard("model/m/w", torch.full((3,), float(step)))], document, SoleRank())


def steps_in(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(root)]


@given(
    scores=st.dictionaries(st.integers(1, 99), st.none() | st.floats(-5, 5) | st.just(math.nan), min_size=1),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 20),
    keep=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
def test_which_checkpoints_are_kept(
    scores: dict[int, float | None], keep_last: int, keep_every: int | None, keep: int, mode: str
) -> None:
    kept = choose_kept(scores, keep_last=keep_last, keep_every=keep_every, best=Best("m", mode, keep))
    known = [step for step, score in scores.items() if score is not None and not math.isnan(score)]
    for step in scores:
        newer = sum(other > step for other in scores)
        ahead = sum(
            (scores[other] < scores[step] if mode == "min" else scores[other] > scores[step])
            or (scores[other] == scores[step] and other < step)
            for other in known
            if step in known
        )
        stays = newer < keep_last or (keep_every and step % keep_every == 0) or (step in known and ahead < keep)
        assert (step in kept) == bool(stays)


def test_newest_every_and_best_stay_on_the_disk(tmp_path: Path) -> None:
    retention = Retention(tmp_path, keep_last=2, keep_every=4, best=Best("eval/held_out/loss"))
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, 2.4, 2.3], start=1):
        retention.committed(save(tmp_path, step, loss))
    assert steps_in(tmp_path) == [2, 4, 6, 7]
    retention.committed(save(tmp_path, 8, 0.5))
    assert steps_in(tmp_path) == [4, 7, 8], "a better one takes the best's place"


def test_a_resumed_run_reads_earlier_checkpoints_and_counts_only_intact_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    rotten = tmp_path / "step-00000003" / "rank-00000.safetensors"
    raw = bytearray(rotten.read_bytes())
    raw[-1] ^= 1
    rotten.write_bytes(raw)
    retention = Retention(tmp_path, keep_last=2)
    retention.committed(save(tmp_path, 4))
    assert steps_in(tmp_path) == [1, 2, 3, 4], "3 was looked at, is damaged and stays; 1 and 2 are not yet known"
    retention.committed(save(tmp_path, 5))
    assert steps_in(tmp_path) == [1, 3, 4, 5], "2 was looked at, is whole, and need not be kept"
    retention.committed(save(tmp_path, 6))
    assert steps_in(tmp_path) == [3, 5, 6]


def test_the_best_is_known_after_a_restart(tmp_path: Path) -> None:
    for step, loss in ((1, 1.0), (2, 2.0)):
        save(tmp_path, step, loss)
    retention = Retention(tmp_path, keep_last=1, best=Best("eval/held_out/loss", "max"))
    retention.mark_intact(tmp_path / "step-00000002")
    retention.committed(save(tmp_path, 3, 1.5))
    assert steps_in(tmp_path) == [2, 3]
