"""Every quantized module computes what the original one does with fake-quantized input and weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from modelopt.core.errors import CalibrationError, ConfigError, ModeError, ShapeError
from modelopt.torch.opt.surgery import original_class
from modelopt.torch.quantization import (
    QuantModuleRegistry,
    SequentialQuantizer,
    TensorQuantizer,
    named_quantizers,
    register,
    replace_quant_module,
    unregister,
)
from modelopt.torch.quantization.conversion import revert_quant_module
from modelopt.torch.quantization.nn.modules import QuantLinear, QuantModule
from modelopt.torch.quantization.nn.transforms import rotate

INT8 = {"num_bits": 8, "axis": None}


def switch_on(module: nn.Module, weight: dict = INT8, inputs: dict | None = None, output: dict | None = None) -> nn.Module:
    replace_quant_module(module)
    for name, q in named_quantizers(module):
        chosen = weight if "weight_quantizer" in name else output if "output_quantizer" in name else inputs
        if chosen is not None:
            q.set_from_cfg(chosen)
    return module


MODULES = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), (2, 4, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (3, 2, 2, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), (3, 4, 6)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), (3, 4, 5, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2), (3, 2, 3, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 6)),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.1), (3, 6)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (2, 3, 6)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 3, 6, 6)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 3, 6)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 3, 6, 6)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 3, 6)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 3, 6, 6)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), (2, 3, 4, 4, 4)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), (2, 3, 6)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (2, 3, 6, 6)),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), (2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_equals_the_original_on_quantized_tensors(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    original = make().eval()
    module = switch_on(copy.deepcopy(original), INT8, INT8, {"num_bits": 4, "axis": None})
    assert type(module).__name__ == f"Quant{name}" and isinstance(module, type(original))
    q8, q4 = TensorQuantizer(INT8), TensorQuantizer({"num_bits": 4, "axis": None})
    x = torch.randn(shape)
    plain = original(x)
    if hasattr(module, "weight_quantizer"):
        original.weight.data = q8(original.weight.data)
    expected = q4(original(q8(x)))
    with torch.no_grad():
        got = module(x)
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert not list(set(module.state_dict()) - set(original.state_dict()))
    revert_quant_module(module)
    assert type(module) is type(original) and not list(named_quantizers(module))


def test_embedding_quantizes_its_table_only() -> None:
    module = switch_on(nn.Embedding(7, 4))
    ids = torch.tensor([[0, 3], [6, 6]])
    assert torch.equal(module(ids), TensorQuantizer(INT8)(module.weight)[ids])
    assert [n for n, _ in named_quantizers(module)] == ["weight_quantizer", "output_quantizer"]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_quantizes_every_layer_and_direction(kind: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    original = getattr(nn, kind)(4, 5, num_layers=2, bidirectional=bidirectional, batch_first=True).eval()
    module = switch_on(copy.deepcopy(original), inputs=INT8)
    names = [n for n, p in original.named_parameters() if n.startswith("weight_")]
    assert {f"{n}_weight_quantizer" for n in names} <= {n for n, _ in named_quantizers(module)}
    assert len(names) == 4 * (1 + bidirectional)
    x, q = torch.randn(2, 3, 4), TensorQuantizer(INT8)
    plain = original(x)[0]
    with torch.no_grad():
        for name in names:
            getattr(original, name).copy_(q(getattr(original, name)))
        got, expected = module(x), original(q(x))
    assert torch.allclose(got[0], expected[0], atol=1e-6) and not torch.allclose(got[0], plain, atol=1e-5)
    module(x)[0].sum().backward()
    assert all(getattr(module, name).grad is not None for name in names)
    packed = pack_padded_sequence(x, [3, 2], batch_first=True)
    assert module(packed)[0].data.shape == original(packed)[0].data.shape


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_recurrent_cells(kind: str) -> None:
    original = getattr(nn, kind)(4, 5)
    module = switch_on(copy.deepcopy(original))
    x, q = torch.randn(2, 4), TensorQuantizer(INT8)
    with torch.no_grad():
        got = module(x)
        for name in ("weight_ih", "weight_hh"):
            getattr(original, name).copy_(q(getattr(original, name)))
        expected = original(x)
    assert torch.equal(got[0] if isinstance(got, tuple) else got, expected[0] if isinstance(expected, tuple) else expected)
    assert isinstance(module.weight_ih, nn.Parameter)


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_not_passed_by(kdim: int | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=batch_first).eval()
    x, other = torch.randn(3, 4, 8), torch.randn(3, 4, kdim or 8)
    disabled = replace_quant_module(copy.deepcopy(original))
    with torch.no_grad():
        assert torch.allclose(disabled(x, other, other)[0], original(x, other, other)[0], atol=1e-6)
    module = switch_on(copy.deepcopy(original))
    with torch.no_grad():
        plain = original(x, other, other)[0]
        for name, p in original.named_parameters():
            if name.endswith("proj_weight") or name == "out_proj.weight":
                p.copy_(TensorQuantizer(INT8)(p))
        expected, attention = original(x, other, other)
        got, got_attention = module(x, other, other)
    assert torch.allclose(got, expected, atol=1e-6) and torch.allclose(got_attention, attention, atol=1e-6)
    assert not torch.allclose(got, plain, atol=1e-5)


def test_transformer_encoder_layer_leaves_its_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = layer(x)
        switch_on(layer, {"num_bits": 4, "axis": None})
        fast = layer(x)
    slow = layer(x.clone().requires_grad_())  # with gradients the fused path is never taken
    assert torch.allclose(fast, slow, atol=1e-6) and not torch.allclose(fast, plain, atol=1e-3)
    revert_quant_module(layer)
    with torch.no_grad():
        assert torch.allclose(layer(x), plain, atol=1e-6)


def test_gradients_pass_straight_through() -> None:
    module = switch_on(nn.Linear(6, 5), INT8, INT8)
    x = torch.randn(3, 6, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight_quantizer(module.weight).sum(0).expand(3, 6), atol=1e-5)
    assert torch.allclose(module.weight.grad, module.input_quantizer(x).sum(0).expand(5, 6), atol=1e-5)


def test_clipped_gradient() -> None:
    q = TensorQuantizer({**INT8, "pass_through_bwd": False})
    q.amax = 1.0
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]


def test_per_channel_axes_of_transposed_convolutions_follow_the_config() -> None:
    module = nn.ConvTranspose2d(4, 6, 3)
    for axis in (0, 1):
        quantized = switch_on(copy.deepcopy(module), {"num_bits": 4, "axis": axis})
        reduced = tuple(d for d in range(4) if d != axis)
        q = TensorQuantizer({"num_bits": 4, "axis": axis})
        q.amax = module.weight.abs().amax(reduced)
        assert torch.equal(quantized.quantized(), q(module.weight))


def test_subclasses_keep_their_class_and_forward_overriders_are_left() -> None:
    class Plain(nn.Linear):
        def extra(self) -> str:
            return "kept"

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Plain(4, 4), Own(4, 4))
    switch_on(model)
    assert isinstance(model[0], QuantLinear) and isinstance(model[0], Plain) and model[0].extra() == "kept"
    assert original_class(model[0]) is Plain and type(model[1]) is Own


def test_shared_modules_are_converted_once_and_hooks_survive() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    replace_quant_module(model)
    assert model["a"] is layer and model["b"] is layer and isinstance(layer, QuantLinear)
    assert len(list(named_quantizers(model))) == 3
    layer(torch.randn(1, 4))
    assert seen == [1]


def test_a_forward_patched_on_the_instance_is_still_quantized() -> None:
    layer = nn.Linear(4, 4)
    layer._old_forward = layer.forward  # what accelerate's hooks do
    layer.forward = lambda *args: layer._old_forward(*args)
    switch_on(layer, {"num_bits": 2, "axis": None})
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight_quantizer(layer.weight), layer.bias))


def test_an_unreachable_forward_is_an_error_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    with pytest.raises(ModeError, match="forward was replaced"):
        replace_quant_module(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.Linear and not list(named_quantizers(model))


def test_copy_and_pickle() -> None:
    class_of = nn.modules.linear.NonDynamicallyQuantizableLinear
    for module in (nn.Linear(4, 4), class_of(4, 4)):
        switch_on(module, INT8, INT8)
        x = torch.randn(2, 4)
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module) and torch.equal(again(x), module(x))
        assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_quantized_class_can_be_constructed() -> None:
    module = QuantLinear(4, 3)
    module.weight_quantizer.set_from_cfg(INT8)
    assert module(torch.randn(2, 4)).shape == (2, 3)


def test_sequential_quantizer_applies_in_order() -> None:
    steps = [{"num_bits": 4, "block_sizes": {-1: 4}}, {"num_bits": (4, 3), "axis": None}]
    q = SequentialQuantizer(*(TensorQuantizer(c) for c in steps))
    x = torch.randn(3, 8)
    assert torch.equal(q(x), TensorQuantizer(steps[1])(TensorQuantizer(steps[0])(x)))
    q.disable()
    assert not q.is_enabled and torch.equal(q(x), x)


def test_register_a_class_in_the_style_of_nvidia() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class QuantScale(Scale):
        def _setup(self) -> None:
            self.input_quantizer = TensorQuantizer()
            self.weight_quantizer = TensorQuantizer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.input_quantizer(x) * self.weight_quantizer(self.weight)

    register(Scale, QuantScale)
    try:
        assert Scale in QuantModuleRegistry
        module = switch_on(Scale(), INT8)
        assert isinstance(module, QuantScale) and isinstance(module, QuantModule)
        assert [t.name for t in module.quantized_tensors()] == ["weight"]
        x = torch.randn(2, 4)
        assert torch.equal(module(x), x * TensorQuantizer(INT8)(module.weight))
        revert_quant_module(module)
        assert type(module) is Scale and not module._modules
    finally:
        unregister(Scale)
    assert Scale not in QuantModuleRegistry
    with pytest.raises(ConfigError, match="_setup"):
        register(Scale, nn.Linear)


def test_statistics_are_checked() -> None:
    q = TensorQuantizer(INT8)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match="amax must be finite"):
            q.amax = bad
    with pytest.raises(ConfigError, match="no format"):
        TensorQuantizer().enable()


def test_constant_amax_survives_reset() -> None:
    q = TensorQuantizer({"num_bits": (4, 3), "axis": None, "use_constant_amax": True})
    q.reset_amax()
    assert float(q.amax) == 448.0
    assert torch.equal(q(torch.tensor([1.03, 500.0])), torch.tensor([1.0, 448.0]))


def test_pre_quant_scale_applies_even_when_disabled() -> None:
    q = TensorQuantizer(INT8)
    q.pre_quant_scale = torch.tensor([2.0, 0.5])
    q.disable()
    assert q(torch.ones(1, 2)).tolist() == [[2.0, 0.5]]


def test_affine_bias() -> None:
    q = TensorQuantizer({"num_bits": 8, "axis": None})
    q.amax, q.bias_value = 1.0, torch.tensor([10.0, -10.0])
    x = torch.tensor([[10.3, -9.6]])
    bias = torch.tensor([10.0, -10.0])
    plain = TensorQuantizer({"num_bits": 8, "axis": None})
    plain.amax = 1.0
    assert torch.equal(q(x), plain(x - bias) + bias)


def test_rotation_is_orthogonal_and_its_own_inverse() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    for block in (-1, 4):
        y = rotate(x, block)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1)) and torch.allclose(rotate(y, block), x)
        assert not torch.allclose(y, x)
    with pytest.raises(ShapeError):
        rotate(torch.randn(2, 6))
    back = TensorQuantizer({**INT8, "rotate": {"enable": True, "mode": "rotate_back"}})
    assert torch.allclose(back(x.float()), x.float(), atol=0.1)
    forth = TensorQuantizer({**INT8, "rotate": True})
    assert torch.allclose(forth(x.float()), rotate(x).float(), atol=0.1)
