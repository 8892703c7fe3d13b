"""Three small, awkward models, ragged data for them, and their objective, in plain PyTorch.

All map token ids [batch, time] to logits [batch, time, VOCAB]. `tp_plan` names the layers for tensor parallelism.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCAB, CONTEXT = 11, 8


class TiedFrozen(nn.Module):
    """Has a tied head, a frozen layer, a frozen part of a repeated block, frozen positions, and a key bias.

    Softmax ignores a value that is added to all of its inputs, so the true gradient of a key bias is zero.
    """

    tp_plan: ClassVar = {"layers.*.linear1": "colwise", "layers.*.linear2": "rowwise"}

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width), requires_grad=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True) for _ in range(2)
        )
        for layer in self.layers:
            layer.linear1.requires_grad_(False)
        self.mixing = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, VOCAB)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Applies the frozen layer, then the blocks."""
        x = self.mixing(self.embed(tokens)) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class Unused(nn.Module):
    """Never uses one layer. Skips a different block in each step, and a gate in every second step, on all ranks."""

    takes_step = True
    tp_plan: ClassVar = {"layers.*.1": "colwise", "layers.*.3": "rowwise"}

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width)) for _ in range(3)
        )
        self.gate = nn.Parameter(torch.randn(width))
        self.never = nn.Linear(3, 3)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        """Skips block `step % 3`. Applies the gate if `step` is even."""
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            if number != step % len(self.layers):
                x = x + layer(x)
        if step % 2 == 0:
            x = x * self.gate
        logits: Tensor = self.head(x)
        return logits


class Shift(nn.Module):
    """A module with a bias only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """x + bias."""
        return x + self.bias


class Odd(nn.Module):
    """Has sizes that are not divisible (5 x 7, vectors of 3 and 1) and no repeated blocks.

    On four ranks most shards differ in size, and many are empty.
    """

    tp_plan: ClassVar = {"head": "replicate"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 5)
        self.rise = nn.Linear(5, 7)
        self.fall = nn.Linear(7, 5, bias=False)
        self.three = nn.Parameter(torch.randn(3))
        self.one = nn.Parameter(torch.ones(1))
        self.shift = Shift(5)
        self.head = nn.Linear(5, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Applies one residual branch, in which three of five entries are scaled."""
        x = self.embed(tokens)
        branch = self.fall(torch.tanh(self.rise(x)))
        branch = torch.cat([branch[..., :3] * self.three, branch[..., 3:]], dim=-1)
        logits: Tensor = self.head(self.shift(x + self.one * branch))
        return logits


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Fixed random tokens. Samples differ in how many of their targets count, so weights are ragged."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, VOCAB, (size, CONTEXT), generator=generator)
        # Targets are half learnable (twice the token), half noise, so that losses fall and gradients do not vanish.
        noise = torch.randint(0, VOCAB, (size, CONTEXT), generator=generator)
        coin = torch.rand(size, CONTEXT, generator=generator) < 0.5
        self.targets = torch.where(coin, self.tokens * 2 % VOCAB, noise)
        lengths = torch.randint(1, CONTEXT + 1, (size,), generator=generator)
        self.targets[torch.arange(CONTEXT)[None, :] >= lengths[:, None]] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.targets[index]


def summed_loss(model: Any, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, int]:
    """Returns the summed cross entropy of the targets that count, and their number, for update number `step`."""
    tokens, targets = batch
    logits = model(tokens, step) if getattr(model, "takes_step", False) else model(tokens)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


def objective(model: Any, batch: tuple[Tensor, Tensor], *, context: Any = None) -> tuple[Tensor, int]:
    """Calls `summed_loss` as an objective of disttrain."""
    return summed_loss(model, batch, context.step)
