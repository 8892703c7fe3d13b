"""Modules, data and objectives as users write them, without disttrain. Tests copy this file out of the project."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.proj(F.gelu(self.fc(self.ln(x))))


class NanoGPT(nn.Module):
    """The nanoGPT idiom: `apply(_init)`, then a second pass over the residual projections; tied head."""

    def __init__(self, vocab=11, width=12, layers=3, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(width) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * layers))

    def _init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, x):
        x = self.drop(self.wte(x))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Encoder(nn.Module):
    """torch's TransformerEncoder, with positions in a buffer that no checkpoint needs, and a buffer that one does."""

    def __init__(self, vocab=11, width=12, context=6):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        position = torch.arange(context).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        table = torch.zeros(context, width)
        table[:, 0::2], table[:, 1::2] = torch.sin(position), torch.cos(position)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("offset", torch.rand(width))
        layer = nn.TransformerEncoderLayer(width, 2, 20, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, vocab)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.table + self.offset))


class Awkward(nn.Module):
    """Tied, frozen, never used, sometimes used, odd sizes. No two ranks use the same parameters."""

    def __init__(self, vocab=11, sometimes=True):
        super().__init__()
        self.embed = nn.Embedding(vocab, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(2))
        self.head = nn.Linear(5, vocab)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.never = nn.Linear(3, 3)
        self.some = nn.Parameter(torch.randn(3))
        self.sometimes = sometimes
        self.register_buffer("seen", torch.ones(1))

    def forward(self, x):
        hidden = self.frozen(self.embed(x))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        if self.sometimes and int(x.sum()) % 2 == 0:
            hidden = hidden * self.some.sum()
        return self.head(hidden)


class Tokens(torch.utils.data.Dataset):
    """Sequences whose length says how many of their targets count, which gives ragged weights."""

    def __init__(self, size=50, vocab=11, context=6):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randint(0, vocab, (size, context), generator=generator)
        self.targets = torch.randint(0, vocab, (size, context), generator=generator)
        lengths = torch.randint(1, context + 1, (size,), generator=generator)
        self.targets[torch.arange(context)[None, :] >= lengths[:, None]] = -100

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]


def token_loss(model, batch):
    """A plain objective: the sum over the targets that count, and their number."""
    inputs, targets = batch
    logits = model(inputs)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


class Generator(nn.Module):
    def __init__(self, noise=4, width=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(noise, 9), nn.Tanh(), nn.Linear(9, width))

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 7), nn.LeakyReLU(0.2), nn.Linear(7, 1))

    def forward(self, x):
        return self.net(x)


class Vectors(torch.utils.data.Dataset):
    """A sample is a real vector and its noise."""

    def __init__(self, size=40):
        generator = torch.Generator().manual_seed(8)
        self.real = torch.randn(size, 6, generator=generator)
        self.noise = torch.randn(size, 4, generator=generator)

    def __len__(self):
        return len(self.real)

    def __getitem__(self, index):
        return self.real[index], self.noise[index]


class Augmented(torch.utils.data.Dataset):
    """Draws from torch's, numpy's and Python's generators for every item."""

    def __init__(self, size=45):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        import random

        import numpy as np

        noise = torch.randn(3) + float(np.random.rand()) + random.random()
        return torch.full((3,), float(index)) + noise, torch.tensor([float(index)])


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x):
        return self.line(x)


def squares(model, batch):
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).sum(), len(inputs)


class Routed(nn.Module):
    """Each batch goes through one expert of two, by its first token; experts have one shape."""

    def __init__(self, vocab=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, width)) for _ in "ab"])
        self.head = nn.Linear(width, vocab)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0]) % 2](self.embed(x)))
