"""The figure: well-formed, repeats drawn once, colours by family, lines where tensors go."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace import analyze_symbols, recursive_trace
from modelopt.torch.trace.draw import draw, pattern_of, patterns
from modelopt.torch.trace.figure.layout import Box, Line, place
from modelopt.torch.trace.figure.scene import build
from tests.torch.trace.models import Classic, tiny_llama

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [e.text for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_layers_of_a_language_model_are_drawn_once():
    graphs = recursive_trace(tiny_llama(num_hidden_layers=6))
    found = texts(draw(graphs))
    assert "layers.0 … layers.5" in found and "× 6" in found
    assert found.count("q_proj") == 1 and "Linear 64 → 128" in found and "input_ids" in found
    assert "attention" in found and found.count("+") == 2 and found.count("×") == 1


def test_scene_has_the_residual_sums():
    graphs = recursive_trace(tiny_llama())
    scene = build(graphs, "model.layers.0")
    titles = [i.title for i in scene.items]
    assert titles == [
        "hidden_states", "input_layernorm", "self_attn", "+", "post_attention_layernorm", "mlp", "+", "output",
    ]  # fmt: skip
    assert {(titles[a], b) for a, b in scene.edges} >= {("hidden_states", 3), ("self_attn", 3), ("+", 6), ("mlp", 6)}


def test_colours_by_family():
    model = tiny_llama()
    graphs = recursive_trace(model)
    analyzer = analyze_symbols(model, graphs)
    found = patterns(analyzer)
    hidden = next(p for p in found.values() if p.size == 64)
    assert hidden.count == 1 and len({p.colour for p in found.values()}) == len(found)
    assert sum(p.count for p in found.values()) == len(analyzer.axes.families)
    assert draw(graphs, analyzer).count(hidden.colour) > 8


def test_a_network_by_graph_rules_alone():
    model = Classic()
    graphs = recursive_trace(model)
    found = texts(draw(graphs, analyze_symbols(model, graphs, method="graph")))
    assert {"conv1", "Conv2d 3×3 3 → 8", "cat", "+", "ReLU"} & set(found) >= {"conv1", "Conv2d 3×3 3 → 8", "cat", "+"}


def test_alternating_layers_are_one_box():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 4), nn.ReLU()) if i % 2 else nn.Linear(4, 4, bias=False) for i in range(8)
            )

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    found = texts(draw(recursive_trace(Two())))
    assert "layers.0 … layers.7" in found and "2 in turn" in found and "× 4" in found


def test_experts_side_by_side_are_one_box():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            return torch.stack([e(x) for e in self.experts]).sum(0)

    assert "experts.0 … experts.5 ∥ 6" in texts(draw(recursive_trace(Experts())))


def test_one_module_and_bad_input():
    graphs = recursive_trace(tiny_llama())
    found = texts(draw(graphs, module="model.layers.1.mlp"))
    assert "gate_proj" in found and "q_proj" not in found
    with pytest.raises(TraceError, match="nothing to draw"):
        draw(recursive_trace(nn.Linear(4, 4), dummy_input=torch.ones(1, 3)))


def test_pattern_of():
    assert pattern_of("h.3.attn.c_proj.weight.1[0:8]") == "h.*.attn.c_proj.weight.1[0:8]"
    assert pattern_of("0.weight.1") == "*.weight.1" and pattern_of("b1.bias.0/2") == "b1.bias.0"


def test_layout_keeps_boxes_apart_and_lines_downwards():
    boxes = [Box(60, 20) for _ in range(7)]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4), (0, 4), (4, 5), (4, 6)]
    lines = [Line(boxes[a], boxes[b]) for a, b in pairs]
    width, height = place(boxes, lines)
    assert all(line.source.y + line.source.height < line.target.y for line in lines)
    for i, a in enumerate(boxes):
        assert 0 <= a.x and a.x + a.width <= width + 1e-6 and a.y + a.height <= height + 1e-6
        for b in boxes[i + 1 :]:
            assert a.row != b.row or a.x + a.width <= b.x + 1e-6 or b.x + b.width <= a.x + 1e-6
    assert [len(line.lanes) for line in lines] == [0] * 6 + [1] + [0, 0]
    assert place([], []) == (0.0, 0.0)
