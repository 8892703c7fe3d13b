"""Models, objectives and an optimizer that do not train the same everywhere, each for a different reason.

Tests copy this file to a temporary folder.
"""

import os
import signal
import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """Two layers. `norm` and `dropout` are applied between them."""

    def __init__(self, inputs=6, width=16, norm=False, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


class Attending(nn.Module):
    """torch's attention. The gradient of its key bias is zero up to rounding."""

    def __init__(self, inputs=6, width=16):
        super().__init__()
        self.up = nn.Linear(1, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.last = nn.Linear(width, 3)
        nn.init.normal_(self.attention.in_proj_bias, std=0.02)

    def forward(self, x):
        h = self.up(x.unsqueeze(-1))
        return self.last((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


def points(size=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, :3]).argmax(dim=1))


def summed(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(inputs)


def averaged(model, batch):
    """A mean that counts itself as one item."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets), 1


def contrasted(model, batch):
    """Compares each item with the others of its batch."""
    outputs = F.normalize(model(batch[0]))
    scores = outputs @ outputs.T / 0.1
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="sum"), len(scores)


class NormedSteps(torch.optim.Optimizer):
    """Steps with the length of a parameter's norm. It depends on complete parameters and cannot detect a shard."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    size = getattr(parameter, "to_local", lambda here=parameter: here)().norm() + 0.1
                    parameter.add_(parameter.grad, alpha=-group["lr"] * float(size))


class Ending:
    """Trains, unless `how` says how its process ends."""

    def __init__(self, how="well"):
        self.how = how

    def __call__(self, model, batch):
        if self.how == "ends":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs":
            time.sleep(1000)
        if self.how == "raises":
            raise RuntimeError("the user's own words")
        return summed(model, batch)
