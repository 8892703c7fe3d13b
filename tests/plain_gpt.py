"""The decoder written out plainly from its papers, with the parameter names of `gpt` and explicit attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class PlainGPT(nn.Module):
    """A flat dictionary of parameters and a forward; built from a state dict, tied head only."""

    def __init__(
        self, state: dict[str, Tensor], *, layers: int, heads: int, kv_heads: int, base: float = 10000.0
    ) -> None:
        super().__init__()
        self.values = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value.clone()) for name, value in state.items()}
        )
        self.layers, self.heads, self.kv_heads, self.base = layers, heads, kv_heads, base

    def value(self, name: str) -> Tensor:
        return self.values[name.replace(".", "/")]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.value(name)

    def turn(self, x: Tensor) -> Tensor:
        """x: [batch, time, heads, d]. Each neighbouring pair is rotated by position * base ** (-pair / pairs)."""
        pairs = x.shape[-1] // 2
        speed = self.base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
        # gpt keeps its table in float32. The test compares the training, not the rounding of the table.
        cos, sin = (part.float().to(x.dtype)[None, :, None, :] for part in (angle.cos(), angle.sin()))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.value("tokens.weight")[tokens]
        batch, time, width = x.shape
        d = width // self.heads
        hidden_mask = torch.full((time, time), -math.inf, dtype=x.dtype).triu(1)
        for layer in range(self.layers):
            at = f"blocks.{layer}."
            y = self.norm(x, at + "attention_norm.weight")
            q, k, v = (y @ self.value(f"{at}attention.{part}.weight").T for part in "qkv")
            q = self.turn(q.view(batch, time, self.heads, d)).transpose(1, 2)
            k = self.turn(k.view(batch, time, self.kv_heads, d)).transpose(1, 2)
            v = v.view(batch, time, self.kv_heads, d).transpose(1, 2)
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(d) + hidden_mask).softmax(-1)
            y = (scores @ v).transpose(1, 2).reshape(batch, time, width)
            x = x + y @ self.value(at + "attention.out.weight").T
            y = self.norm(x, at + "swiglu_norm.weight")
            gate, up = (y @ self.value(f"{at}swiglu.{part}.weight").T for part in ("gate", "up"))
            x = x + (gate * torch.sigmoid(gate) * up) @ self.value(at + "swiglu.down.weight").T
        return self.norm(x, "norm.weight") @ self.value("tokens.weight").T


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Summed cross entropy and the number of targets."""
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()
