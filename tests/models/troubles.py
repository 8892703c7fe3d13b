"""Data and objectives that fail, each in its own way, without disttrain. Tests copy this file out of the project."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import Dataset, TensorDataset


class Line(nn.Module):
    def __init__(self, inputs=3):
        super().__init__()
        self.line = nn.Linear(inputs, 1)

    def forward(self, x):
        return self.line(x)


def points(size=40):
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


class Odd(Dataset):
    """One item has another shape."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.ones(4 if index == 17 else 3), torch.ones(1)


class Unreadable(Dataset):
    """The file of one item does not exist."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 17:
            Path("/nowhere/17.png").read_bytes()
        return torch.ones(3), torch.ones(1)


class BoomError(Exception):
    pass


def on_rank_one(step):
    return os.environ.get("RANK") == "1" and step == 3


def squares(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y, reduction="sum"), len(x)


def below_zero(model, batch):
    """Returns a negative weight: two micro-batches of -3 among a rank's eight samples."""
    return squares(model, batch)[0], torch.tensor(-1.5)


class Raises:
    """Raises on one rank at the third step. With `late`, the others first wait in a collective."""

    def forward(self, model, batch, context):
        if on_rank_one(context.step + 1):
            time.sleep(1.0)
            raise BoomError("the user's own words")
        return model(batch[0])

    def loss(self, output, batch):
        return F.mse_loss(output, batch[1], reduction="sum"), len(batch[0])


class Leaves(Raises):
    """Ends the process of one rank without a message."""

    def forward(self, model, batch, context):
        if on_rank_one(context.step + 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch[0])


class NotFinite(Raises):
    """A loss that is not a number, on one rank, at the third step."""

    def forward(self, model, batch, context):
        return model(batch[0]) * (float("nan") if on_rank_one(context.step + 1) else 1.0)


class Steep(Raises):
    """A finite loss whose gradient is not."""

    def forward(self, model, batch, context):
        return model(batch[0]) + (torch.sqrt(model.line.weight.sum() * 0.0) if context.step == 2 else 0.0)


class Exits(Raises):
    """User code that calls sys.exit."""

    def forward(self, model, batch, context):
        if on_rank_one(context.step + 1):
            raise SystemExit(9)
        return model(batch[0])


def other_frozen():
    """Freezes a different part on each rank."""
    model = Line()
    model.line.bias.requires_grad_(os.environ.get("RANK") == "0")
    return model


def other_weights():
    """A constructor that depends on the rank."""
    model = Line()
    with torch.no_grad():
        model.line.weight += float(os.environ.get("RANK", 0))
    return model
