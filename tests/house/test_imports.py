"""Law 2: importing costs little, loads no framework, touches no GPU and changes nobody else's attributes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, resource, sys, time
import torch, torch.nn.functional as F
names = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.modules.module", "torch.autograd", "torch.distributed")
watched = {name: sys.modules[name] for name in names}
watched |= {"Module": torch.nn.Module, "Tensor": torch.Tensor, "Parameter": torch.nn.Parameter, "Linear": torch.nn.Linear}
def picture():
    return {(n, k): id(v) for n, o in watched.items() for k, v in vars(o).items() if not k.startswith("__")}
before, seen = picture(), set(sys.modules)
memory, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
import MODULE
seconds = time.process_time() - clock
after = picture()
print(json.dumps({
    "seconds": seconds,
    "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024,
    "changed": [f"{n}.{k}" for (n, k), v in before.items() if after.get((n, k)) != v],
    "added": [f"{n}.{k}" for (n, k) in after if (n, k) not in before and k not in ("modelopt",)],
    "loaded": sorted({m.split(".")[0] for m in sys.modules} - {m.split(".")[0] for m in seen}),
    "dynamo": "torch._dynamo" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.mark.parametrize(
    "module", ["modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.opt", "modelopt.torch.export"]
)
def test_import_is_light_and_leaves_others_alone(module):
    command = [sys.executable, "-c", PROBE.replace("MODULE", module)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["changed"] == []
    assert not {"triton", "transformers", "accelerate", "matplotlib", "pandas", "scipy", "compressed_tensors"} & set(
        found["loaded"]
    )
    assert not found["dynamo"] and not found["cuda"]
    assert found["megabytes"] < 60
