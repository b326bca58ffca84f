"""Modes for tests: small, complete, and without any technique of the library."""

from __future__ import annotations

import torch
from torch import nn

from modelopt.core.config import Config
from modelopt.torch.opt.mode import Mode, ModeTable
from modelopt.torch.opt.surgery import convert_class, walk


class Scaled:
    def forward(self, x):
        y = super().forward(x)
        return y if self._amax is None else y * self._amax.float()


_CLASSES: dict[type, type] = {}


def scaled_class(cls):
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Scaled{cls.__name__}", (Scaled, cls), {})
    return _CLASSES[cls]


class ScaleConfig(Config):
    factor: float = 2.0
    dtype: str = "float32"


class ScaleMode(Mode):
    """Every Linear gets a buffer `_amax`; restore leaves it None, so that the file must fill it."""

    name = "scale"
    Config = ScaleConfig

    def apply(self, model, config, fail=False):
        for _, m in list(walk(model)):
            if isinstance(m, nn.Linear) and not isinstance(m, Scaled):
                convert_class(m, scaled_class(type(m)))
                m.register_buffer("_amax", torch.tensor(config.factor).to(getattr(torch, config.dtype)))
        if fail:
            raise RuntimeError("asked to fail")
        return model

    def state(self, model, config):
        return {"layers": [n for n, m in walk(model) if isinstance(m, Scaled)]}

    def restore(self, model, config, state):
        for name in state["layers"]:
            m = model.get_submodule(name)
            convert_class(m, scaled_class(type(m)))
            m.register_buffer("_amax", None)
        return model


class PackMode(Mode):
    """Weights become packed bytes and float8 scales; earlier steps can no longer be read from the model."""

    name = "pack"
    next_modes = frozenset()
    after = frozenset({"scale"})
    rewrites = True

    def _pack(self, m, shape=None):
        n, k = m.weight.shape
        device = m.weight.device
        m.weight = nn.Parameter(torch.zeros(n, k // 2, dtype=torch.uint8, device=device), requires_grad=False)
        m.register_buffer("scale", torch.zeros(n, device=device).to(torch.float8_e4m3fn))
        m.register_buffer("scale8", torch.zeros(n, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu))
        m.register_buffer("scale5", torch.zeros(n, device=device).to(torch.float8_e5m2))

    def apply(self, model, config):
        for _, m in walk(model):
            if isinstance(m, nn.Linear):
                self._pack(m)
                torch.manual_seed(m.out_features)
                with torch.no_grad():
                    m.weight.copy_(torch.randint(0, 256, m.weight.shape, dtype=torch.uint8))
                    for name in ("scale", "scale8", "scale5"):
                        bits = torch.randint(0, 256, m.scale.shape, dtype=torch.uint8)
                        m._buffers[name] = bits.view(m._buffers[name].dtype)
        return model

    def state(self, model, config):
        return {"layers": [n for n, m in walk(model) if hasattr(m, "scale8")]}

    def restore(self, model, config, state):
        for name in state["layers"]:
            self._pack(model.get_submodule(name))
        return model


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class WrapMode(Mode):
    name = "wrap"
    rewrites = True

    def apply(self, model, config):
        return Wrapper(model)

    def restore(self, model, config, state):
        return Wrapper(model)


class NoteMode(Mode):
    name = "note"
    repeatable = True

    def apply(self, model, config):
        return model

    def restore(self, model, config, state):
        return model


REGISTRY = ModeTable("mode")
for _mode in (ScaleMode, PackMode, WrapMode, NoteMode):
    REGISTRY.register(_mode.name, _mode)


class Tied(nn.Module):
    """Embedding and head are one parameter, a block has two names, and there is a bfloat16 buffer."""

    def __init__(self, dim=8, vocab=11, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.block = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim, bias=False))
        self.again = self.block
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(dim, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        return self.head(self.again(self.block(self.embed(ids))) + self.offset)


def ids():
    return torch.arange(11)[None]


def bits(model):
    from modelopt.torch.utils import digest

    return {n: digest(t) for n, t in model.state_dict().items()}
