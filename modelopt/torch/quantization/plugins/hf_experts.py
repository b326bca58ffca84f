"""Fused experts: one parameter holds a matrix for each expert, and each of these is quantized as a matrix [out, in] of its own.

    x_SH = input_quantizer(hidden)[token]           y_SI = gate(x W1_e^T + b1_e)           W_e = weight_quantizers[e](W[e])
    out_TH = sum over k of  r_TK * (down_input_quantizer(y) W2_e^T + b2_e)

T tokens, K choices of the router, S = T K routed rows sorted by expert, E experts, H hidden, I intermediate. Both input
quantizers are one for all experts of the layer, so an expert that no calibration token reached uses the range of its layer, and
its weight has the range of the weight itself. The rows of the second input keep the index of their token, so that padding is
left out of it. Once packed, the products of all experts are one op on their codes, `modelopt::quantized_grouped_linear`.

Layouts: transformers' `use_experts_implementation` ([E, 2I, H], or transposed, with biases, interleaved or without a gate),
Llama 4 (every expert sees every token), DBRX (matrices stacked in 2-D tensors), and JetMoE (one matrix each).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelopt.core.errors import ConfigError
from modelopt.numerics import Format
from modelopt.torch import kernels
from modelopt.torch.calibration.data import select_tokens
from modelopt.torch.quantization.backends.packed_gemm import only_rounds
from modelopt.torch.quantization.nn.modules.packed import PackedExperts
from modelopt.torch.quantization.nn.modules.quant_module import (
    QuantizedTensor,
    QuantModule,
    QuantModuleRegistry,
)
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer
from modelopt.torch.quantization.nn.modules.weight_cache import quantized_weight

Given = tuple[str, Tensor | None]
_ROUTED = ("hidden_states", "top_k_index", "top_k_weights")


class ExpertsBase(QuantModule):
    """Base of the layouts: which parameters hold experts, which of them read the first input, and how one is laid out."""

    packable = ("gate_up_proj", "up_proj", "down_proj", "w1", "v1", "w2", "weight")
    counts_in_coverage = True

    @classmethod
    def projections_of(cls, module: Any) -> tuple[tuple[str, ...], str | None]:
        """Return the parameters that read the module's input, and the one that reads the intermediate values."""
        return ("gate_up_proj",), "down_proj"

    @classmethod
    def packed_of(cls, module: Any, name: str) -> PackedExperts | None:
        """Return the packed matrices that stand for the parameter `name`, or None."""
        return module._modules.get(f"{name}_packed")

    @classmethod
    def shape_of(cls, module: Any, name: str) -> tuple[int, ...]:
        """Return the shape of the parameter `name`, packed or not."""
        packed = cls.packed_of(module, name)
        return tuple(module._parameters[name].shape) if packed is None else packed.stored_shape

    @classmethod
    def transposed_in(cls, module: Any, name: str) -> bool:
        """Return whether matrices of the parameter `name` are stored [in, out]."""
        return False

    @classmethod
    def stacked(cls, module: Any, name: str) -> Tensor:
        """Return the parameter as [E, .., ..]."""
        return getattr(module, name)

    @classmethod
    def num_experts_of(cls, module: Any, name: str) -> int:
        """Return the number of matrices in the parameter `name`."""
        return cls.shape_of(module, name)[0]

    @classmethod
    def _parameters_of(cls, module: Any) -> tuple[str, ...]:
        first, down = cls.projections_of(module)
        return first if down is None else (*first, down)

    @classmethod
    def quantizers_of(cls, module: nn.Module) -> tuple[str, ...]:
        """One quantizer for each of the two inputs, one for each expert's matrix of each parameter."""
        first, down = cls.projections_of(module)
        names = [f"{first[0]}_input_quantizer"]
        if down is not None:
            names.append(f"{down}_input_quantizer")
        for name in cls._parameters_of(module):
            names += [f"{name}_weight_quantizers.{e}" for e in range(cls.num_experts_of(module, name))]
        return tuple(names)

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield every expert's matrix [out, in], a view unless it is packed."""
        for name in cls._parameters_of(module):
            transposed = cls.transposed_in(module, name)
            for e, matrix in enumerate(cls.stacked(module, name)):
                yield f"{name}_weight_quantizers.{e}", name, matrix.t() if transposed else matrix, e

    def quantized_tensors(self) -> Iterator[QuantizedTensor]:
        """Yield every expert's matrix [out, in] with its quantizer and that of its input."""
        first, _ = self.projections_of(self)
        interleaved = not getattr(self, "is_concatenated", True)
        for quantizer, name, tensor, expert in self.weights_of(self):
            packed = self.packed_of(self, name)
            yield QuantizedTensor(
                name,
                tensor,
                self.get_submodule(quantizer),
                self._modules[f"{first[0] if name in first else name}_input_quantizer"],
                expert=expert,
                packed=None if packed is None or expert is None else packed.expert(expert),
                transposed=self.transposed_in(self, name),
                interleaved=interleaved and name in first,
            )

    def _acts(self) -> bool:
        quantizers = (m for m in self.modules() if isinstance(m, TensorQuantizer))
        packed = any(isinstance(m, PackedExperts) for m in self._modules.values())
        return packed or any(q.enabled or q._pre_quant_scale is not None for q in quantizers)

    def _matrices(self, name: str) -> list[Tensor]:
        """Return the views [out, in] of all experts."""
        stacked = self.stacked(self, name)
        return list(stacked.transpose(1, 2) if self.transposed_in(self, name) else stacked)

    def _all_packed(self) -> bool:
        return all(self.packed_of(self, name) is not None for name in self._parameters_of(self))

    def _counts(self, chosen: Tensor, experts: int) -> Sequence[int] | Tensor:
        """Return how often each expert is in `chosen`: a tensor in graphs, and where all is packed (no wait)."""
        if torch.compiler.is_compiling() or self._all_packed():
            return (chosen[:, None] == torch.arange(experts, device=chosen.device)).sum(0)
        return torch.bincount(chosen, minlength=experts)[:experts].tolist()  # type: ignore[no-any-return]

    def _each_expert(self, x: Tensor, name: str, counts: Sequence[int] | Tensor, given: Given = ("", None)) -> Tensor:
        """Multiply rows [S, in], sorted by expert with `counts` rows each, by their expert's matrix; rows left over: zeros.

        `given`: the format and range to which packed experts have to round their rows.
        """
        packed, bias = self.packed_of(self, name), self._parameters.get(f"{name}_bias")
        if packed is not None:
            ends = torch.as_tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
            offsets = F.pad(ends, (1, 0))
            return kernels.quantized_grouped_linear(
                x.to(packed.dtype), offsets, packed.parts, packed.format, packed.shape[1], bias, *given
            )
        quantizers, matrices = self._modules[f"{name}_weight_quantizers"], self._matrices(name)
        if isinstance(counts, Tensor):  # in a graph: one node for the product of all experts
            stacked = torch.stack([q(w) for q, w in zip(quantizers, matrices, strict=True)])
            ends = counts.cumsum(0, dtype=torch.int32)
            y = torch.ops.transformers.grouped_mm_fallback(x.to(stacked.dtype), stacked.transpose(1, 2).contiguous(), ends)
            if bias is None:
                return y
            owner = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends).sum(1).clamp(max=len(matrices) - 1)
            return y + bias[owner]
        pieces, start = [], 0
        for e, n in enumerate(counts):
            if n:
                weight = quantized_weight(quantizers[e], matrices[e])
                pieces.append(F.linear(x[start : start + n].to(weight.dtype), weight, None if bias is None else bias[e]))
                start += n
        if start < x.shape[0] or not pieces:
            pieces.append(matrices[0].new_zeros(x.shape[0] - start, matrices[0].shape[0]))
        return torch.cat(pieces)

    def _rounded(self, x: Tensor, names: Sequence[str]) -> tuple[Tensor, Given]:
        """Quantize the input of the parameters `names`, or say how, where their product on codes does it row by row."""
        quantizer = self._modules[f"{names[0]}_input_quantizer"]
        if all(self.packed_of(self, name) is not None for name in names) and only_rounds(quantizer):
            text, amax, global_amax, _ = quantizer.op_arguments()  # type: ignore[operator]
            amax = global_amax if amax is None else amax
            if by_rows(quantizer.format):  # type: ignore[arg-type]
                return x, (text, amax)
        return quantizer(x), ("", None)

    def _gate(self, *values: Tensor) -> Tensor:
        """Return the intermediate values from those of the first parameters."""
        raise NotImplementedError

    def _both_stages(self, hidden: Tensor, token: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Run rows hidden[token], sorted by expert, through both products: [T, H] -> [S, H]."""
        first, down = self.projections_of(self)
        x, given = self._rounded(hidden, first)
        x = x[token]
        y = self._gate(*(self._each_expert(x, name, counts, given) for name in first))
        with select_tokens(token, hidden.shape[0]):
            y, given = self._rounded(y, (str(down),))
        return self._each_expert(y, str(down), counts, given)

    def _route(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Send tokens [T, H] to the experts `index` [T, K] (E and above: none) and add the results times `weights`."""
        first, _ = self.projections_of(self)
        experts = self.num_experts_of(self, first[0])
        choices, chosen = index.shape[-1], index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = self._counts(chosen, experts)
        y = self._both_stages(hidden, order // choices, counts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)  # type: ignore[operator]
        kept = weights.reshape(-1).masked_fill(chosen >= experts, 0.0)[order]
        y = (y * kept[:, None])[torch.argsort(order)]
        return y.unflatten(0, (hidden.shape[0], choices)).sum(1).to(hidden.dtype)


class QuantExperts(ExpertsBase):
    """Experts after transformers' experts interface: gate_up_proj (or up_proj) and down_proj, `_apply_gate` or `act_fn`."""

    @classmethod
    def projections_of(cls, module: Any) -> tuple[tuple[str, ...], str | None]:
        """gate_up_proj, or up_proj where there is no gate; then down_proj."""
        found = module._parameters.keys() | module._modules.keys()
        return ("gate_up_proj" if {"gate_up_proj", "gate_up_proj_packed"} & found else "up_proj",), "down_proj"

    @classmethod
    def transposed_in(cls, module: Any, name: str) -> bool:
        """As the class declares; without a declaration, from the shapes: the first input is the last output."""
        declared = getattr(module, "is_transposed", None)
        if declared is not None:
            return bool(declared)
        (first,), down = cls.projections_of(module)
        return cls.shape_of(module, first)[2] != cls.shape_of(module, str(down))[1]

    def _gate(self, *values: Tensor) -> Tensor:
        if getattr(self, "has_gate", True):
            return self._apply_gate(values[0])  # type: ignore[operator]
        return self.act_fn(values[0])  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(hidden [T, H], expert indices [T, K], router weights [T, K]) -> [T, H]."""
        if not self._acts():
            return super().forward(*args, **kwargs)
        values = (*args, *kwargs.values())  # the names differ between models, the order does not
        if len(values) != 3:
            raise ConfigError(
                f"{type(self).__name__} was called with {len(values)} values; three are known: {', '.join(_ROUTED)}."
            )
        hidden, index, weights = values
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._route(flat, index.reshape(-1, index.shape[-1]), weights.reshape(-1, weights.shape[-1])).view_as(hidden)


class QuantLlama4Experts(ExpertsBase):
    """Llama 4: [E, H, 2I], and every expert gets every token, scaled (by zero where it was not chosen)."""

    @classmethod
    def transposed_in(cls, module: Any, name: str) -> bool:
        """Matrices are stored [in, out]."""
        return True

    def _gate(self, *values: Tensor) -> Tensor:
        gate, up = values[0].chunk(2, dim=-1)
        return up * self.act_fn(gate)  # type: ignore[operator]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[E * T, H], expert after expert -> the same shape."""
        if not self._acts():
            return super().forward(hidden_states)
        experts = self.num_experts_of(self, "gate_up_proj")
        tokens = hidden_states.shape[0] // experts  # type: ignore[operator]
        token = torch.arange(tokens, device=hidden_states.device).repeat(experts)
        counts: Any = torch.full((experts,), tokens, device=token.device) if self._all_packed() else [tokens] * experts
        with select_tokens(token, tokens):
            x, given = self._rounded(hidden_states, ("gate_up_proj",))
            y, then = self._rounded(self._gate(self._each_expert(x, "gate_up_proj", counts, given)), ("down_proj",))
        return self._each_expert(y, "down_proj", counts, then)


class QuantDbrxGLU(ExpertsBase):
    """DBRX' matrices: w1 and v1 [E * I, H], w2 [E * I, H] stored [in, out]."""

    @classmethod
    def projections_of(cls, module: Any) -> tuple[tuple[str, ...], str | None]:
        """w1 and v1 read the input, w2 their product."""
        return ("w1", "v1"), "w2"

    @classmethod
    def transposed_in(cls, module: Any, name: str) -> bool:
        """Only w2."""
        return name == "w2"

    @classmethod
    def stacked(cls, module: Any, name: str) -> Tensor:
        """View [E * I, H] as [E, I, H]."""
        return getattr(module, name).view(module.moe_num_experts, module.ffn_hidden_size, module.hidden_size)

    @classmethod
    def num_experts_of(cls, module: Any, name: str) -> int:
        """As the module says."""
        return int(module.moe_num_experts)

    def _gate(self, *values: Tensor) -> Tensor:
        return self.activation_fn(values[0]) * values[1]  # type: ignore[operator]


class QuantDbrxExperts(QuantModule):
    """DBRX' experts: routing around the matrices, whose quantizers are in the child `mlp`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[B, T, H] and [B * T, K] routing -> [B, T, H]."""
        glu = self._modules["mlp"]
        if not isinstance(glu, QuantDbrxGLU) or not glu._acts():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return glu._route(flat, top_k_index, top_k_weights).view_as(hidden_states)


class QuantParallelExperts(ExpertsBase):
    """JetMoE: `weight` [E, out, in] and rows sorted by expert, of which it is not known which token each is."""

    @classmethod
    def projections_of(cls, module: Any) -> tuple[tuple[str, ...], str | None]:
        """One matrix for each expert."""
        return ("weight",), None

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """[S, in] with `expert_size` rows for each expert -> [S, out]."""
        if not self._acts():
            return super().forward(inputs, expert_size)
        x, given = self._rounded(inputs, ("weight",))
        return self._each_expert(x, "weight", list(expert_size), given)


def by_rows(fmt: Format) -> bool:
    """Whether rounding a matrix to a format rounds every row as if it were alone, whatever the order of the rows.

    >>> [by_rows(parse(f)) for f in ("e4m3[-1]~*f32", "e4m3[...]*f32", "e4m3[...]~*f32", "i8[2,64]~*f32")]
    [True, True, False, False]
    """
    rows = fmt.block.sizes((4, 1 << 20))[0]
    return rows == 1 or (rows == 4 and not fmt.dynamic)


_KNOWN: dict[str, type[QuantModule]] = {
    "transformers.models.llama4.modeling_llama4:Llama4TextExperts": QuantLlama4Experts,
    "transformers.models.dbrx.modeling_dbrx:DbrxExpertGLU": QuantDbrxGLU,
    "transformers.models.dbrx.modeling_dbrx:DbrxExperts": QuantDbrxExperts,
    "transformers.models.jetmoe.modeling_jetmoe:JetMoeParallelExperts": QuantParallelExperts,
}


def follows_interface(module: nn.Module) -> bool:
    """Return whether `module` is experts in the layout of transformers' experts interface, declared or by its parts."""
    found = {n for n, p in module._parameters.items() if p is not None and p.dim() == 3}
    if not ({"gate_up_proj", "down_proj"} <= found or {"up_proj", "down_proj"} <= found):
        return False
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return True
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return tuple(parameters) == _ROUTED and hasattr(module, "_apply_gate")


def register_experts(modules: Sequence[nn.Module]) -> None:
    """Register quantized classes for the fused experts among `modules`."""
    for key, value in _KNOWN.items():
        if key not in QuantModuleRegistry.types():
            QuantModuleRegistry.register(key, value)
    for module in modules:
        cls = type(module)
        if not isinstance(module, QuantModule) and not QuantModuleRegistry.exact(cls) and follows_interface(module):
            QuantModuleRegistry.register(cls, QuantExperts)
