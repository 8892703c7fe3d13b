"""Modules, data and objectives as users have them: nothing of disttrain in here. Tests copy this file out of the project."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


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
    """torch's own TransformerEncoder, with positions computed into a buffer that no checkpoint needs and one it does."""

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
    """Tied, frozen, never used, sometimes used, odd sizes; no two ranks use the same parameters."""

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
    """Sequences whose length says how many of their targets count: ragged weights."""

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
    """A plain objective: the sum over the targets that count, and how many they are."""
    inputs, targets = batch
    logits = model(inputs)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())
