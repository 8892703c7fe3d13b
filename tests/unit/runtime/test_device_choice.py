"""The choice of a rank's device, backend and number of threads."""

from __future__ import annotations

import pytest
import torch

from disttrain.errors import LaunchError
from disttrain.runtime import Launch, apply_device, choose_device
from disttrain.runtime.environment import cpu_quota

PAIR = Launch("torchrun", rank=1, local_rank=1, world_size=2, local_world_size=2)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")


def test_the_cpu_uses_gloo() -> None:
    found = choose_device("cpu", PAIR)
    assert (found.device, found.backend) == (torch.device("cpu"), "gloo")


@no_cuda
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert choose_device("auto", PAIR) == choose_device("cpu", PAIR)


@no_cuda
def test_a_missing_gpu_is_rejected() -> None:
    with pytest.raises(LaunchError, match=r"(?s)run.device=cuda.*2 processes.*0 usable CUDA.*set run.device=cpu") as no:
        choose_device("cuda", PAIR)
    assert "nproc_per_node" not in str(no.value), "fewer processes would not help"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_rank_has_a_separate_gpu() -> None:
    found = torch.cuda.device_count()
    last = Launch("torchrun", found - 1, found - 1, found, found)
    assert choose_device("auto", last).device == torch.device("cuda", found - 1)
    assert choose_device("cuda", last).backend == "cpu:gloo,cuda:nccl"
    with pytest.raises(LaunchError, match=f"start --nproc_per_node={found}"):
        choose_device("auto", Launch("torchrun", found, found, found + 1, found + 1))


def test_a_task_that_sees_one_gpu_under_srun_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    task = Launch("srun", rank=3, local_rank=3, world_size=8, local_world_size=4)
    assert choose_device("auto", task).device == torch.device("cuda", 0)
    with pytest.raises(LaunchError, match="1 usable CUDA"):
        choose_device("auto", PAIR)


def test_threads_come_from_the_config_or_the_user_or_are_a_fair_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_device("cpu", PAIR, threads=5).threads == 5
    assert choose_device("cpu", PAIR).threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_device("cpu", PAIR).threads == max(1, cpu_quota() // 2)
    assert choose_device("cpu", Launch("torchrun", 0, 0, 512, 512)).threads == max(1, cpu_quota() // 512)


def test_the_chosen_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            apply_device(choose_device("cpu", PAIR, threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
