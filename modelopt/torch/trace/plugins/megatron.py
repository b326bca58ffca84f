"""Megatron-Core: symbols of the tensor-parallel layers. Sizes are those of the whole layer, not of one rank's part."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from modelopt.torch.trace.symbols import Symbol, SymInfo, SymMap
from modelopt.torch.trace.tracer import RobustTracer

for _layer in (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding):
    RobustTracer.register_leaf(_layer)


@SymMap.register([ColumnParallelLinear, RowParallelLinear])
def linear(module: nn.Module) -> SymInfo:
    """Return the symbols of a parallel linear layer: `input_size` comes in, `output_size` goes out."""
    return SymInfo(
        input_size=Symbol(cl_type=Symbol.CLType.INCOMING, elastic_dims={-1}, slots=(("weight", 1),)),
        output_size=Symbol(
            is_searchable=True, cl_type=Symbol.CLType.OUTGOING, elastic_dims={-1}, slots=(("weight", 0), ("bias", 0))
        ),
    )


@SymMap.register(VocabParallelEmbedding)
def embedding(module: nn.Module) -> SymInfo:
    """Return the symbol of a parallel embedding: the width of its rows."""
    return SymInfo(
        embedding_dim=Symbol(is_searchable=True, cl_type=Symbol.CLType.OUTGOING, elastic_dims={-1}, slots=(("weight", 1),))
    )
