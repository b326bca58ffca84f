"""Small models that the tests of tracing share."""

from __future__ import annotations

import torch
from torch import nn


class Classic(nn.Module):
    """conv, batch norm, relu, a residual sum, a concatenation, a depthwise convolution, global pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.bn3 = nn.BatchNorm2d(14)
        self.conv4 = nn.Conv2d(14, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = x + self.bn2(self.conv2(x))
        z = self.bn3(self.depthwise(torch.cat([y, self.conv3(y)], 1)))
        return self.fc(torch.flatten(self.pool(self.conv4(z)), 1))


class Branch(nn.Module):
    """Python that torch.fx cannot follow: a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 1e9 else self.linear(x) + 1


def tiny_llama(**changes):
    """A Llama with two layers of width 64 (skips the test without transformers)."""
    import pytest

    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()
