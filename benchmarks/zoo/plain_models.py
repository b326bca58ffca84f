"""Small networks of plain torch modules that need no other package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo import Example


class Residual(nn.Module):
    """Three residual blocks with a depthwise convolution and squeeze-and-excitation, then a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(self.block(width) for _ in range(3))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(3))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def block(width: int) -> nn.Module:
        hidden = 2 * width
        layers = [
            nn.Conv2d(width, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
        ]
        return nn.Sequential(*layers, nn.GroupNorm(4, hidden), nn.SiLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, gate in zip(self.blocks, self.gates, strict=True):
            y = block(x)
            x = x + y * gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block with a fused qkv projection, and a tied output embedding."""

    def __init__(self, width: int = 32, heads: int = 4, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.heads, self.head_dim = heads, width // heads

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return {"logits": self.head(self.norm3(x))}


class Recurrent(nn.Module):
    """An embedding, two recurrent layers and a linear head."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.embed, self.cells, self.head = (
            nn.Embedding(20, width),
            nn.LSTM(width, hidden, 2, batch_first=True),
            nn.Linear(hidden, 5),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cells(self.embed(ids))[0])


def _mlp() -> Example:
    layers = [
        ("up", nn.Linear(8, 32)),
        ("act", nn.ReLU()),
        ("mid", nn.Linear(32, 16)),
        ("norm", nn.LayerNorm(16)),
        ("out", nn.Linear(16, 4)),
    ]
    return Example(nn.Sequential(OrderedDict(layers)), (torch.randn(4, 8),))


def _cnn() -> Example:
    features = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
    ]
    return Example(
        nn.Sequential(*features, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)), (torch.randn(2, 3, 16, 16),)
    )


MODELS: dict[str, Callable[[], Example]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "residual": lambda: Example(Residual(), (torch.randn(2, 3, 12, 12),)),
    "attention": lambda: Example(Attention(), (torch.randint(0, 50, (2, 12)),)),
    "mha": lambda: Example(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (torch.randn(2, 6, 32),)),
    "lstm": lambda: Example(Recurrent(), (torch.randint(0, 20, (2, 5)),)),
}


def build(name: str) -> Example:
    """Create one of `MODELS`."""
    return MODELS[name]()
