"""What `import modelopt.torch.quantization` costs over `import torch`: CPU seconds, memory, modules.

python -m benchmarks.imports
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

PROBE = """
import json, resource, sys, time
import torch
before, memory, clock = len(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
import MODULE
USE
print(json.dumps([time.process_time() - clock, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024,
                  len(sys.modules) - before]))
"""


def measure(module: str, use: str = "", repeats: int = 5) -> tuple[float, float, int]:
    """Return (median CPU seconds, median MB, modules) over `import torch`."""
    rows = []
    for _ in range(repeats):
        code = PROBE.replace("MODULE", module).replace("USE", use)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append(json.loads(run.stdout))
    return statistics.median(r[0] for r in rows), statistics.median(r[1] for r in rows), rows[0][2]


def main() -> None:
    print("| import, over `import torch` | CPU seconds | MB | modules |\n|---|---|---|---|")
    rows = {
        "modelopt.torch.quantization": "",
        "modelopt.torch.quantization, and its `quantize` looked up": "modelopt.torch.quantization.quantize",
        "modelopt.torch.opt": "",
        "modelopt.torch.export": "",
    }
    for label, use in rows.items():
        seconds, megabytes, modules = measure(label.split(",")[0], use)
        print(f"| {label} | {seconds:.2f} | {megabytes:.0f} | {modules} |")


if __name__ == "__main__":
    main()
