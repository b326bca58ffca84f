"""Operators of the library: `torch.library` ops; their default is the plain-torch law, on a GPU Triton and CUDA C++ kernels.

    fake_quantize(x, format, amax, global_amax, amin)   x rounded to what the format can hold; straight-through gradient
    quantize(x, format, ...) -> [codes, *scales, zero]  packed codes and scales          dequantize(parts, format, shape, dtype)
    amax(x, format)                                     the largest magnitude of each block
    hadamard(x, size, signs)                            Walsh-Hadamard transform; rotated_fake_quantize, rotated_quantize: fused
    histogram(x, num_bins, limit) -> counts, amax       of |x|, in equal bins up to a limit or bins from the leading bits
    quantized_linear(x, weight, weight_format, n, ...)  a linear layer on packed codes; quantized_grouped_linear: fused experts

A format travels as its notation (`modelopt.numerics.parse`), so that a graph, a file and a log show the same string. Every op
has a fake kernel and an autograd formula: `torch.compile(fullgraph=True)` and `torch.export` see one node. `explain(x, format)`
says which kernel serves and why a faster one does not; `MODELOPT_KERNELS=reference` forces the law.
"""

from modelopt.torch.kernels.amax import amax as amax
from modelopt.torch.kernels.choice import explain as explain
from modelopt.torch.kernels.dequantize import dequantize as dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize as fake_quantize
from modelopt.torch.kernels.hadamard import hadamard as hadamard
from modelopt.torch.kernels.hadamard import rotated_fake_quantize as rotated_fake_quantize
from modelopt.torch.kernels.hadamard import rotated_quantize as rotated_quantize
from modelopt.torch.kernels.histogram import histogram as histogram
from modelopt.torch.kernels.matmul import explain_linear as explain_linear
from modelopt.torch.kernels.matmul import quantized_linear as quantized_linear
from modelopt.torch.kernels.matmul.grouped import explain_grouped as explain_grouped
from modelopt.torch.kernels.matmul.grouped import quantized_grouped_linear as quantized_grouped_linear
from modelopt.torch.kernels.quantize import quantize as quantize
from modelopt.torch.kernels.quantize import quantized as quantized
