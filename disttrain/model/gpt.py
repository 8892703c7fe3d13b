"""Implements `gpt` (`model.target: gpt`), a modern decoder in one readable file.

The model uses RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), SwiGLU
(2002.05202), and a tied or untied head. Dropout applies to the embedding and to each branch, so that attention keeps
its fused kernels. `init_weights` defines the initial values.

Shapes: b batch, t time, c width, v vocab, h query heads, g key-value heads, d width of a head, f hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from disttrain.errors import ConfigError, DataError, explain
from disttrain.model.initialize import fill_self
from disttrain.runtime.seeds import GeneratorFor


class GPT(nn.Module):
    """Maps tokens [b, t] of type int64 or int32 to logits [b, t, v].

    A model built under `torch.manual_seed(s)` is bit-equal to one built on the meta device and filled from
    `init_weights(generators_for(s))`.

    Args:
        vocab: the number of token ids.
        context: the largest number of tokens per item.
        layers: the number of blocks.
        heads: query heads per block.
        width: the width of the residual stream.
        kv_heads: key-value heads per block, which must divide `heads`. None means `heads`.
        hidden: the hidden width of SwiGLU. None means two thirds of 4 * width, rounded up to a multiple of 64.
        dropout: from 0 to below 1.
        tied: whether the head shares the weight of the token table.
        rope_base: the base of the rotary angles.

    Raises:
        ConfigError: a size is invalid, or the sizes do not fit together.
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
        _check_sizes(
            vocab=vocab, context=context, layers=layers, heads=heads, width=width, kv_heads=kv_heads, hidden=hidden
        )
        _check_shares(dropout, rope_base)
        # Two thirds of 4 * width keep the parameter count of a two-matrix block (2002.05202). Kernels prefer
        # multiples of 64.
        hidden = -(-8 * width // (3 * 64)) * 64 if hidden is None else hidden
        self.context, self.rope_base, self.heads, self.kv_heads = context, rope_base, heads, kv_heads
        self.tokens = TokenTable(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden, dropout) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = None if tied else Linear(width, vocab)
        self.register_buffer("rotary", torch.empty(context, width // heads // 2, 2), persistent=False)
        self.rotary: Tensor
        fill_self(self)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Return the logits of the next token at each position. Raises DataError for invalid tokens."""
        _check_tokens(tokens_bt, self.context)
        rotary_td = self.rotary[: tokens_bt.shape[1]]
        x_btc = self.dropout(self.tokens(tokens_bt))
        for block in self.blocks:
            x_btc = block(x_btc, rotary_td)
        x_btc = self.norm(x_btc)
        logits_btv: Tensor = self.tokens(x_btc, to_logits=True) if self.head is None else self.head(x_btc)
        return logits_btv

    @property
    def tp_plan(self) -> dict[str, str]:
        """The tensor parallel plan in Hugging Face's terms.

        Attention is cut by heads, SwiGLU by hidden features, and the token table and the head by vocabulary. The
        modules between them are cut along time if sequence parallel is on.
        """
        block = {
            "attention_norm": "sequence_parallel",
            "attention.q": "colwise",
            "attention.k": "colwise",
            "attention.v": "colwise",
            "attention.out": "rowwise",
            "swiglu_norm": "sequence_parallel",
            "swiglu.gate": "colwise",
            "swiglu.up": "colwise",
            "swiglu.down": "rowwise",
            "dropout": "sequence_parallel",
        }
        ends = {"tokens": "embedding_rowwise", "dropout": "sequence_parallel", "norm": "sequence_parallel"}
        head = {} if self.head is None else {"head": "colwise_gather_output"}
        return {**ends, **{f"blocks.*.{name}": style for name, style in block.items()}, **head}

    def check_tensor_parallel(self, degree: int) -> None:
        """Raise ConfigError if the heads of queries, keys and values cannot be divided evenly over `degree` ranks."""
        if self.heads % degree or self.kv_heads % degree:
            problem = f"heads={self.heads}, kv_heads={self.kv_heads}"
            fix = "choose a degree that divides both, or change model.args"
            raise ConfigError(explain(f"Cannot divide the heads of gpt over mesh.tensor={degree} ranks.", problem, fix))

    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the full initial value of each parameter and buffer, on the CPU, from shapes alone."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, device="cpu")
                continue
            value = torch.empty(parameter.shape, device="cpu")
            yield name, value.normal_(0.0, _std(name, layers=len(self.blocks)), generator=generator_for(name))
        context, pairs, _ = self.rotary.shape
        yield "rotary", _rotary_table(context, pairs, self.rope_base)


class Block(nn.Module):
    """Two residual branches, attention and then SwiGLU, each with a norm before it."""

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
    """Causal attention. Each of the `kv_heads` key-value heads serves `heads / kv_heads` query heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.shared, self.head_width = kv_heads < heads, width // heads
        self.q = Linear(width, width)
        self.k = Linear(width, kv_heads * self.head_width)
        self.v = Linear(width, kv_heads * self.head_width)
        self.out = Linear(width, width)

    def forward(self, x_btc: Tensor, rotary_td: Tensor) -> Tensor:
        # The number of heads is inferred, because under tensor parallel a rank has only some of them.
        q, k, v = (part(x_btc).unflatten(-1, (-1, self.head_width)) for part in (self.q, self.k, self.v))
        y_bhtd = F.scaled_dot_product_attention(
            rotate(q, rotary_td).transpose(1, 2),
            rotate(k, rotary_td).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.shared,
        )
        y_btc: Tensor = self.out(y_bhtd.transpose(1, 2).flatten(2))
        return y_btc


class SwiGLU(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_btc: Tensor) -> Tensor:
        y_btc: Tensor = self.down(F.silu(self.gate(x_btc)) * self.up(x_btc))
        return y_btc


class TokenTable(nn.Module):
    """Maps tokens to vectors, and as a tied head maps vectors to logits.

    Both uses are in one module, because sharding wrappers gather a module's weight only around its forward.
    """

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, x: Tensor, to_logits: bool = False) -> Tensor:
        if to_logits:
            return F.linear(x, self.weight)
        try:
            return F.embedding(x, self.weight)
        except IndexError:  # raised on the CPU only: on a GPU the check would have to wait for the device
            problem = f"ids from {int(x.min())} to {int(x.max())} for vocab={self.weight.shape[0]}"
            fix = "raise model.args.vocab, or correct the data"
            raise DataError(explain("Token ids must be at least 0 and less than vocab.", problem, fix)) from None


class Linear(nn.Linear):
    """A linear layer without bias and without initial values. The model writes all values once, in `init_weights`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing, because `init_weights` would overwrite torch's random values."""


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square and multiplies it by a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def rotate(x_bthd: Tensor, rotary_td: Tensor) -> Tensor:
    """Rotate each pair of adjacent entries by the angle of its position, as a complex product in at least float32."""
    wide = x_bthd if x_bthd.dtype in (torch.float32, torch.float64) else x_bthd.float()
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    turned = pairs * torch.view_as_complex(rotary_td.to(wide.dtype))[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_bthd.dtype)


def _rotary_table(context: int, pairs: int, base: float) -> Tensor:
    """Return cos and sin of position * base^(-pair/pairs), float32 of shape [t, d/2, 2].

    The angles are computed in float64, because float32 is inexact for large positions.
    """
    speed = base ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    angle = torch.arange(context, dtype=torch.float64, device="cpu")[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def _std(name: str, *, layers: int) -> float:
    """Return GPT-2's standard deviation for a weight.

    It is 0.02. Weights that add to the residual stream use 0.02 / sqrt(2 * layers), so that the variance of the stream
    does not grow with depth.
    """
    return 0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02


def _check_tokens(tokens_bt: Tensor, context: int) -> None:
    if tokens_bt.dim() != 2 or tokens_bt.dtype not in (torch.int64, torch.int32):
        raise DataError(
            explain(
                "gpt needs token ids [batch, time] of type int64.",
                f"shape {tuple(tokens_bt.shape)} of type {tokens_bt.dtype}",
                "make each item of the dataset one row of token ids",
            )
        )
    if tokens_bt.shape[1] > context:
        raise DataError(
            explain(
                f"gpt reads at most context={context} tokens at a time.",
                f"the items have {tokens_bt.shape[1]} tokens",
                "shorten the items of the dataset, or raise model.args.context",
            )
        )


def _check_sizes(*, heads: int, width: int, kv_heads: int, **others: int | None) -> None:
    sizes = {"heads": heads, "width": width, "kv_heads": kv_heads, **others}
    wrong = {n: s for n, s in sizes.items() if s is not None and not (isinstance(s, Integral) and s >= 1)}
    if wrong:
        problem = ", ".join(f"{name}={size!r}" for name, size in wrong.items())
        fix = "set positive integers"
    elif width % heads or (width // heads) % 2:
        problem, fix = f"width={width} for heads={heads}", "choose a width that is an even multiple of heads"
    elif heads % kv_heads:
        problem, fix = f"heads={heads} for kv_heads={kv_heads}", "choose kv_heads that divides heads"
    else:
        return
    raise ConfigError(explain("The sizes of gpt are invalid.", problem, fix))


def _check_shares(dropout: float, rope_base: float) -> None:
    if not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
        fix = "set a number from 0 to below 1"
        raise ConfigError(explain("The dropout of gpt is invalid.", f"dropout={dropout!r}", fix))
    if not (isinstance(rope_base, int | float) and 0.0 < rope_base < float("inf")):
        fix = "set a positive number, 10000.0 or larger"
        raise ConfigError(explain("The rope_base of gpt is invalid.", f"rope_base={rope_base!r}", fix))
