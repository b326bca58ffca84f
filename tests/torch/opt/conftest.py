import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toy

from modelopt.torch.opt.mode import ModeRegistry


@pytest.fixture
def toy_modes():
    """The modes of toy.py under their names in the global registry, where files are restored from."""
    for name in toy.REGISTRY:
        ModeRegistry.register(name, toy.REGISTRY.get(name))
    yield toy.REGISTRY
    for name in toy.REGISTRY:
        ModeRegistry.unregister(name)
