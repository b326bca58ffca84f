"""Minimal models, one for each rule, and the sizes of the families that must be prunable in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.torch.trace.axes.oracle import Body

L = nn.Linear


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def heads(x: torch.Tensor, h: int) -> torch.Tensor:
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def attend(m: Any, x: torch.Tensor, fused: bool) -> torch.Tensor:
    q, k, v = heads(m.q(x), m.h), heads(m.k(x), m.kv), heads(m.v(x), m.kv)
    if fused:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=m.h != m.kv, is_causal=True)
    else:
        k, v = k.repeat_interleave(m.h // m.kv, 1), v.repeat_interleave(m.h // m.kv, 1)
        y = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
    return m.o(y.transpose(1, 2).flatten(2))


def rotate(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    half = y.shape[-1] // 2
    turned = torch.cat([-y[..., half:], y[..., :half]], -1)
    return m.b(y * m.c.cos() + turned * m.c.sin())


def moe(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight, chosen = m.gate(x).softmax(-1).topk(m.k, -1)
    out = torch.zeros_like(x)
    for e in range(m.e):
        token, slot = torch.where(chosen == e)
        up = F.linear(x[token], m.up[e])
        out.index_add_(0, token, F.linear(torch.relu(up), m.down[e]) * weight[token, slot, None])
    return m.head(out)


def conv(i: int, o: int, **kw: Any) -> nn.Module:
    return nn.Conv2d(i, o, kw.pop("k", 3), padding=kw.pop("p", 1), **kw)


def _written(y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(y.shape[0], y.shape[1] + 1, y.shape[2], dtype=y.dtype)
    buffer[:, 1:] = y
    buffer[:, 0] += y.mean(1)
    return buffer


class Scan(nn.Module):
    """A diagonal state space: A [C, N], an outer product and a contraction over the state, in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.dt, self.bc, self.out = L(6, 16), L(16, 16), L(16, 8), L(16, 5)
        self.a = nn.Parameter(torch.rand(16, 4))
        self.n = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.silu(self.inp(x))
        b, c = self.bc(u).split([self.n, self.n], -1)
        step = F.softplus(self.dt(u))
        state = x.new_zeros(x.shape[0], u.shape[-1], self.n)
        outs = []
        for t in range(x.shape[1]):
            state = state * torch.exp(-step[:, t, :, None] * self.a) + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
            outs.append(torch.matmul(state, c[:, t, :, None]).squeeze(-1))
        return self.out(torch.stack(outs, 1))


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# name: (model, input, sizes of the families that must be prunable)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "mlp": (lambda: seq(L(6, 16), nn.ReLU(), L(16, 8), nn.Sigmoid(), L(8, 3)), (2, 6), [8, 16]),
    "residual": (lambda: Body(lambda m, x: m.c(m.a(x) + m.b(torch.tanh(m.a(x)))), a=L(6, 8), b=L(8, 8), c=L(8, 3)), (2, 6), [8]),
    "gate_up_chunk": (lambda: Body(lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, -1))), a=L(6, 16), b=L(8, 3)), (2, 6), [8]),
    "glu": (lambda: seq(L(6, 16), nn.GLU(), L(8, 3)), (2, 6), [8]),
    "fused_qkv_split": (
        lambda: Body(
            lambda m, x: m.b(torch.cat([p.relu() for p in m.a(x).split([4, 6, 6], -1)[::-1]], -1)), a=L(5, 16), b=L(16, 3)
        ),
        (2, 5),
        [],
    ),
    "cat": (lambda: Body(lambda m, x: m.c(torch.cat([m.a(x), x, m.b(x)], -1)), a=L(6, 4), b=L(6, 8), c=L(18, 3)), (2, 6), [4, 8]),
    "stack_mean": (
        lambda: Body(lambda m, x: m.c(torch.stack([m.a(x), m.b(x)]).mean(0)), a=L(6, 8), b=L(6, 8), c=L(8, 3)),
        (2, 6),
        [8],
    ),
    "flip_pad": (lambda: Body(lambda m, x: m.b(F.pad(m.a(x).flip(-1), (2, 1), value=0.5)), a=L(6, 8), b=L(11, 3)), (2, 6), [8]),
    "einsum": (
        lambda: Body(lambda m, x: torch.einsum("bi,oi->bo", torch.einsum("bi,hi->bh", x, m.w), m.v), w=r(8, 6), v=r(3, 8)),
        (2, 6),
        [8],
    ),
    "outer_bmm": (lambda: Body(lambda m, x: m.b((m.a(x) @ m.w).flatten(1)), a=L(6, 8), w=r(8, 4), b=L(12, 3)), (2, 3, 6), [4, 8]),
    "stacked_bmm": (
        lambda: Body(lambda m, x: torch.bmm(torch.bmm(x, m.u).relu(), m.d).sum(0), u=r(4, 6, 8), d=r(4, 8, 3)),
        (4, 2, 6),
        [8],
    ),
    "embedding": (lambda: Body(lambda m, x: m.b(m.a(x.long().abs().clamp(max=8))), a=nn.Embedding(9, 8), b=L(8, 3)), (2, 5), [8]),
    "layer_norm": (lambda: seq(L(6, 16), nn.LayerNorm(16), L(16, 3)), (2, 6), [16]),
    "rms_norm": (lambda: seq(L(6, 16), nn.RMSNorm(16), L(16, 3)), (2, 6), [16]),
    "mean_square": (
        lambda: Body(
            lambda m, x: m.b(m.w * (y := m.a(x)) * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)),
            a=L(6, 16),
            w=r(16),
            b=L(16, 3),
        ),
        (2, 6),
        [16],
    ),
    "conv_bn": (
        lambda: seq(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(4, 3)),
        (2, 3, 6, 6),
        [4, 8],
    ),
    "conv_flatten": (lambda: Body(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 8), b=L(128, 3)), (2, 3, 4, 4), [8]),
    "conv1d_over_tokens": (
        lambda: Body(lambda m, x: m.o(m.c(m.a(x)).relu()).mean(1), a=L(6, 8), c=nn.Conv1d(5, 7, 1), o=L(8, 3)),
        (2, 5, 6),
        [7, 8],
    ),
    "depthwise": (lambda: seq(conv(3, 8), conv(8, 8, groups=8), conv(8, 3)), (2, 3, 6, 6), [8]),
    "depthwise_multiplier": (lambda: seq(conv(3, 4), conv(4, 8, groups=4), conv(8, 3)), (2, 3, 6, 6), [2, 4]),
    "grouped": (lambda: seq(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 3)), (2, 3, 6, 6), [2, 3, 4]),
    "transposed": (lambda: seq(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 3)), (2, 3, 6, 6), [6, 8]),
    "transposed_grouped": (
        lambda: seq(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), conv(12, 3)),
        (2, 3, 6, 6),
        [2, 3, 4],
    ),
    "group_norm": (lambda: seq(conv(3, 12), nn.GroupNorm(4, 12), conv(12, 3)), (2, 3, 6, 6), [3, 4]),
    "squeeze_excite": (
        lambda: Body(
            lambda m, x: m.o((y := m.c(x)) * m.b(m.a(y.mean((2, 3), keepdim=True)).relu()).sigmoid()).mean((2, 3)),
            c=conv(3, 8),
            a=conv(8, 4, k=1, p=0),
            b=conv(4, 8, k=1, p=0),
            o=conv(8, 3),
        ),
        (2, 3, 6, 6),
        [4, 8],
    ),
    "pixel_shuffle": (lambda: seq(conv(3, 16), nn.PixelShuffle(2), conv(4, 3)), (2, 3, 4, 4), [4]),
    "pixel_unshuffle": (lambda: seq(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 3)), (2, 3, 4, 4), [4]),
    "channel_shuffle": (lambda: seq(conv(3, 12), nn.ChannelShuffle(3), conv(12, 3)), (2, 3, 4, 4), [4]),
    "upsample_pool": (
        lambda: seq(conv(3, 8), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.AvgPool2d(2), conv(8, 3)),
        (2, 3, 8, 8),
        [8],
    ),
    "attention": (
        lambda: Body(lambda m, x: attend(m, x, False), q=L(6, 16), k=L(6, 16), v=L(6, 16), o=L(16, 3), h=4, kv=4),
        (2, 5, 6),
        [4, 4],
    ),
    "attention_fused": (
        lambda: Body(lambda m, x: attend(m, x, True), q=L(6, 16), k=L(6, 16), v=L(6, 16), o=L(16, 3), h=4, kv=4),
        (2, 5, 6),
        [4, 4],
    ),
    "attention_grouped": (
        lambda: Body(lambda m, x: attend(m, x, False), q=L(6, 32), k=L(6, 16), v=L(6, 16), o=L(32, 3), h=8, kv=4),
        (2, 5, 6),
        [2, 4, 4],
    ),
    "multihead": (
        lambda: Body(
            lambda m, x: m.o(m.a(y := m.i(x), y, y)[0]), i=L(6, 16), a=nn.MultiheadAttention(16, 4, batch_first=True), o=L(16, 3)
        ),
        (2, 5, 6),
        [4, 16, 16],
    ),
    "encoder_layer": (
        lambda: seq(L(6, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), L(16, 3)),
        (2, 5, 6),
        [4, 16, 32],
    ),
    "rotary": (lambda: Body(rotate, a=L(6, 16), b=L(16, 3), c=r(16)), (2, 6), [8]),
    "lstm": (lambda: Body(lambda m, x: m.o(m.r(x)[0]), r=nn.LSTM(6, 8, 2, batch_first=True), o=L(8, 3)), (2, 5, 6), [8]),
    "lstm_bidirectional": (
        lambda: Body(lambda m, x: m.o(m.r(x)[0]), r=nn.LSTM(6, 8, bidirectional=True), o=L(16, 3)),
        (5, 2, 6),
        [8],
    ),
    "gru": (lambda: Body(lambda m, x: m.o(m.r(x)[0]), r=nn.GRU(6, 8), o=L(8, 3)), (5, 2, 6), [8]),
    "rnn": (lambda: Body(lambda m, x: m.o(m.r(x)[0]), r=nn.RNN(6, 8), o=L(8, 3)), (5, 2, 6), [8]),
    "scan": (Scan, (2, 4, 6), [16]),
    "experts_kept": (lambda: Body(moe, gate=L(6, 4), up=r(4, 8, 6), down=r(4, 6, 8), head=L(6, 3), e=4, k=2), (5, 6), [8]),
    "write_into_a_view": (
        lambda: Body(lambda m, x: m.b(_written(m.a(x))), a=L(6, 8), b=L(8, 3)),
        (2, 4, 6),
        [8],
    ),
    "fourier": (lambda: Body(lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), a=L(6, 8), b=L(8, 3)), (2, 4, 6), [8]),
    "weight_norm": (lambda: seq(nn.utils.parametrizations.weight_norm(L(6, 8)), L(8, 3)), (2, 6), [8]),
    "position_table": (
        lambda: Body(lambda m, x: m.b(m.a(x) + m.p[: x.shape[1]]), a=L(6, 8), p=r(9, 8), b=L(8, 3)),
        (2, 4, 6),
        [8],
    ),
    "unfold": (lambda: Body(lambda m, x: m.b(F.unfold(m.a(x), 2).transpose(1, 2)), a=conv(3, 8), b=L(32, 3)), (2, 3, 4, 4), [8]),
    "diagonal": (
        lambda: Body(
            lambda m, x: m.b(torch.diagonal(m.a(x).unsqueeze(-1) * torch.ones_like(m.a(x)).unsqueeze(-2), 0, -2, -1)),
            a=L(6, 8),
            b=L(8, 3),
        ),
        (2, 6),
        [8],
    ),
    "expand": (
        lambda: Body(lambda m, x: m.b(m.a(x)[:, None].expand(-1, m.n, -1)).mean(1), a=L(6, 8), b=L(8, 3), n=4),
        (2, 6),
        [8],
    ),
    "where_mask": (
        lambda: Body(lambda m, x: m.b(torch.where((y := m.a(x)) > 0, y, y * m.s)), a=L(6, 8), s=r(8), b=L(8, 3)),
        (2, 6),
        [8],
    ),
    "overlapping_windows": (
        lambda: Body(
            lambda m, x: m.b((y := m.a(x)).as_strided((2, 3, 4, y.shape[-1]), (y.stride(0), 2 * y.stride(1), y.stride(1), 1))),
            a=L(6, 8),
            b=L(8, 3),
        ),
        (2, 8, 6),
        [8],
    ),
    "hardswish": (lambda: seq(L(6, 8), nn.Hardswish(inplace=True), L(8, 3)), (2, 6), [8]),
    "prelu": (lambda: seq(L(6, 8), nn.PReLU(8), L(8, 3)), (2, 6), [8]),
}
