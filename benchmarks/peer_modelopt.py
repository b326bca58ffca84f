"""Fake quantization by nvidia-modelopt: `benchmarks.peers` runs this file in a process whose path has that library, not this one.

python -P peer_modelopt.py out.json SIZE [FORMAT ...]        one bf16 tensor of SIZE x SIZE; TB/s of bytes read and written
"""

from __future__ import annotations

import functools
import json
import pathlib
import runpy
import sys
from typing import Any

import torch

measure = runpy.run_path(str(pathlib.Path(__file__).with_name("timing.py")))["measure"]  # the folder itself is not on the path

FORMATS: dict[str, dict[str, Any]] = {
    "NVFP4 dynamic": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}, "axis": None},
    "FP8 per tensor": {"num_bits": (4, 3), "axis": None},
    "INT8 per tensor": {"num_bits": 8, "axis": None},
    "INT8 per channel": {"num_bits": 8, "axis": 0},
    "INT4 block 128": {"num_bits": 4, "block_sizes": {-1: 128}},
    "MXFP4": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "MXFP8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, LookupError)


def main() -> None:
    """Measure the formats that are named, or all, and write records."""
    import modelopt
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    out, size, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(FORMATS)
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    records = []
    for name in names:
        record: dict[str, Any] = {"case": f"nvidia-modelopt {modelopt.__version__}, fake_quantize {name}", "size": size}
        try:
            quantizer = TensorQuantizer(QuantizerAttributeConfig(**FORMATS[name])).cuda()
            quantizer.enable_calib()
            quantizer.disable_quant()
            quantizer(x)
            if quantizer._calibrator is not None and quantizer._calibrator.compute_amax() is not None:
                quantizer.load_calib_amax()
            quantizer.disable_calib()
            quantizer.enable_quant()
            with torch.no_grad():
                us = measure([functools.partial(quantizer, x)], 2)
            record |= {"us": us, "TB/s": 2 * x.nbytes / us / 1e6}
        except FAILURES as error:
            record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(record, flush=True)
        records.append(record)
        with open(out, "w") as file:
            json.dump(records, file)


if __name__ == "__main__":
    main()
