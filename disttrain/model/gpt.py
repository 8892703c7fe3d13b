"""`gpt`: a modern decoder in one file, for reading and for speed.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202),
tied or untied head. Dropout, where asked for, is on the embedding and on each branch, so that attention keeps its fused
kernels. Refuses shapes that do not fit; owns its initial values by `init_weights`.
Enters: configs (`model.target: gpt`), strategy by way of `disttrain.model.initialize`.

Shapes: b batch, t time, c width, v vocab, h query heads, g key-value heads, d width of a head, f hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from disttrain.errors import ConfigError, DataError, explain
from disttrain.model.initialize import fill_self
from disttrain.runtime.seeds import GeneratorFor


class GPT(nn.Module):
    """Tokens [b, t] of type int64 to logits [b, t, v].

    Built under `torch.manual_seed(s)` it is bit-equal to its shapes filled by `init_weights(generators_for(s))`.
    Raises ConfigError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        # Two thirds of 4 * width keep the parameters of a two-matrix block (2002.05202); multiples of 64 suit kernels.
        hidden = -(-8 * width // (3 * 64)) * 64 if hidden is None else hidden
        _check_sizes(vocab=vocab, context=context, layers=layers, heads=heads, width=width, kv_heads=kv_heads)
        self.context, self.rope_base = context, rope_base
        self.tokens = TokenTable(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden, dropout) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = None if tied else Linear(width, vocab)
        self.register_buffer("rotary", torch.empty(context, width // heads // 2, 2), persistent=False)
        self.rotary: Tensor
        fill_self(self)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Logits of the next token at each position. Raises DataError for more than `context` positions."""
        time = tokens_bt.shape[1]
        if time > self.context:
            raise DataError(
                explain(
                    f"The model reads at most context={self.context} tokens at a time.",
                    f"items of {time} tokens",
                    "shorten the data's items, or raise model.args.context",
                )
            )
        rotary_td = self.rotary[:time]
        x_btc = self.dropout(self.tokens(tokens_bt))
        for block in self.blocks:
            x_btc = block(x_btc, rotary_td)
        x_btc = self.norm(x_btc)
        logits_btv: Tensor = self.tokens(x_btc, to_logits=True) if self.head is None else self.head(x_btc)
        return logits_btv

    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name with its whole initial value on the CPU, from shapes alone."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape)
                continue
            std = _std(name, parameter.shape, layers=len(self.blocks))
            yield name, torch.empty(parameter.shape).normal_(0.0, std, generator=generator_for(name))
        context, pairs, _ = self.rotary.shape
        yield "rotary", _rotary_table(context, pairs, self.rope_base)


class Block(nn.Module):
    """Two residual branches, each normed at its entrance: attention, then SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.swiglu_norm = RMSNorm(width)
        self.swiglu = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_btc: Tensor, rotary_td: Tensor) -> Tensor:
        x_btc = x_btc + self.dropout(self.attention(self.attention_norm(x_btc), rotary_td))
        y_btc: Tensor = x_btc + self.dropout(self.swiglu(self.swiglu_norm(x_btc)))
        return y_btc


class Attention(nn.Module):
    """Causal attention; `kv_heads` heads of keys and values each serve `heads / kv_heads` heads of queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_width)
        self.out = Linear(width, width)

    def forward(self, x_btc: Tensor, rotary_td: Tensor) -> Tensor:
        # Queries and keys lie side by side, so that one product makes them and one application turns them.
        qkv = self.qkv(x_btc).view(*x_btc.shape[:2], self.heads + 2 * self.kv_heads, self.head_width)
        qk, v = qkv.tensor_split([self.heads + self.kv_heads], dim=2)
        q, k = rotate(qk, rotary_td).tensor_split([self.heads], dim=2)
        y_bhtd = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.kv_heads < self.heads,
        )
        y_btc: Tensor = self.out(y_bhtd.transpose(1, 2).flatten(2))
        return y_btc


class SwiGLU(nn.Module):
    """silu(gate) * up, then down; gate and up are one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_btc: Tensor) -> Tensor:
        gate_btf, up_btf = self.gate_up(x_btc).chunk(2, dim=-1)
        y_btc: Tensor = self.down(F.silu(gate_btf) * up_btf)
        return y_btc


class TokenTable(nn.Module):
    """A vector for each token, read both ways: tokens to vectors, and as a tied head vectors to logits.

    One module with both readings, because sharding wrappers gather a module's weight around its own forward.
    """

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, x: Tensor, to_logits: bool = False) -> Tensor:
        return F.linear(x, self.weight) if to_logits else F.embedding(x, self.weight)


class Linear(nn.Linear):
    """Without bias, and left as allocated: the model writes every value once, in `init_weights`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: torch's own draw would be overwritten."""


class RMSNorm(nn.Module):
    """Each vector over its root mean square, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def rotate(x_bthd: Tensor, rotary_td: Tensor) -> Tensor:
    """Turn each pair of neighbouring entries by its position's angle: a complex product, in float32 at least."""
    wide = x_bthd if x_bthd.dtype in (torch.float32, torch.float64) else x_bthd.float()
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    turned = pairs * torch.view_as_complex(rotary_td.to(wide.dtype))[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_bthd.dtype)


def _rotary_table(context: int, pairs: int, base: float) -> Tensor:
    """cos and sin of position * base^(-pair/pairs), [t, d/2, 2]; in float64 first: float32 loses far angles."""
    speed = base ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    angle = torch.arange(context, dtype=torch.float64, device="cpu")[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def _std(name: str, shape: torch.Size, *, layers: int) -> float:
    """GPT-2's: 0.02, and what feeds the residual stream over sqrt(2 * layers), so that its variance does not grow."""
    return 0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02


def _check_sizes(**sizes: int) -> None:
    heads, width, kv_heads = sizes["heads"], sizes["width"], sizes["kv_heads"]
    if min(sizes.values()) < 1:
        found = ", ".join(f"{name}={size}" for name, size in sizes.items() if size < 1)
        do = "give positive whole numbers"
    elif width % heads or (width // heads) % 2:
        found, do = f"width={width} over heads={heads}", "choose a width that is an even multiple of heads"
    elif heads % kv_heads:
        found, do = f"heads={heads} over kv_heads={kv_heads}", "choose kv_heads that divides heads"
    else:
        return
    raise ConfigError(explain("The sizes of gpt are to fit together.", found, do))
