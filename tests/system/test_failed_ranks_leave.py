"""A rank that fails during a collective exits by itself, even if its peer never joins the collective."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launched import PROJECT, launch, status, user_environment

PEER_SLEEPS_S = 240
CONFIG = """
version: 1
run: {name: mine, dir: runs, steps: 10}
model: {target: "parts:Net"}
objective: {target: "parts:make_loss"}
data: {train: {target: "parts:Rows"}, global_batch: 4, micro_batch: 2}
optim: {target: torch.optim.AdamW, args: {lr: 0.01}}
strategy: {name: ddp}
report: {progress: false, plot: false}
"""
PARTS = f"""
import os
import time

import torch
from torch import nn

FIRST = os.environ.get("RANK") == "0"


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if FIRST and Net.calls > 2:
            raise ValueError("the user's backward broke")
        return gradient


class Net(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x):
        Net.calls += 1
        if not FIRST and Net.calls > 2:
            time.sleep({PEER_SLEEPS_S})
        return Breaks.apply(self.line(x))


class Rows:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), index / 64)


def make_loss():
    return lambda model, batch: (model(batch).square().sum(), len(batch))
"""
OWN_LOOP = """
import disttrain

engine = disttrain.Engine("mine.yaml")
engine.prepare("model")
for micro_batches in engine.batches():
    engine.accumulate("model", micro_batches)
    engine.step("model")
    engine.log()
    if engine.should_stop():
        break
engine.finish()
"""


@pytest.mark.parametrize("script", [["-m", "disttrain.run", "mine.yaml"], ["own_loop.py"]], ids=["run", "own loop"])
def test_the_first_cause_ends_the_world(script: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "own_loop.py").write_text(OWN_LOOP)
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    environment = user_environment(PYTHONPATH=str(PROJECT))
    # Far less than the peer's sleep, and than the group's timeout of half an hour.
    done = launch(
        *(sys.executable, *agent, *script),
        timeout_s=PEER_SLEEPS_S / 3,
        cwd=tmp_path,
        environment=environment,
        expect=1,
    )
    assert "ValueError: the user's backward broke" in done.stderr
    assert status(tmp_path / "runs" / "mine")["state"] == "failed"
    assert "backward broke" in status(tmp_path / "runs" / "mine")["reason"]
