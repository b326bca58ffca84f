from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from torch import nn
before = set(sys.modules)
names = {{c: set(vars(c)) for c in (nn.Module, nn.Linear)}}
import {module}
heavy = [m for m in set(sys.modules) - before
         if m.split(".")[0] in ("triton", "transformers", "accelerate") or m.startswith("torch._dynamo")]
assert not heavy, heavy
assert names == {{c: set(vars(c)) for c in names}}
"""


@pytest.mark.parametrize("module", ["modelopt.torch", "modelopt.torch.opt", "modelopt.torch.utils"])
def test_import_is_light_and_patches_nothing(module):
    subprocess.run([sys.executable, "-c", CODE.format(module=module)], check=True)


def test_lazy_subpackages():
    code = """
import sys, modelopt.torch as mt
assert "modelopt.torch.opt" not in sys.modules
assert mt.opt.apply_mode and "opt" in dir(mt)
try:
    mt.nothing
except AttributeError as e:
    assert "nothing" in str(e)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
