"""Quantizers as NVIDIA's `mto.save` describes them, turned into ours.

    metadata["quantizer_state"]["fc.weight_quantizer"] = {"_disabled", "_num_bits", "_axis", "_block_sizes", "_unsigned",
        "_narrow_range", "_dynamic", "_pytorch_state_metadata": {"buffers": {"_amax": {"shape", "dtype"}}}}

Source: the public layout of ModelOpt 0.47's state, facts only.
"""

from __future__ import annotations

from typing import Any

from modelopt.core.errors import CheckpointError
from modelopt.torch.quantization.attributes import QuantizerAttributeConfig
from modelopt.torch.quantization.nn.modules.tensor_quantizer import BUFFERS

_KEYS = {
    "_num_bits": "num_bits",
    "_axis": "axis",
    "_block_sizes": "block_sizes",
    "_unsigned": "unsigned",
    "_narrow_range": "narrow_range",
}


def quantizers_from_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the structure (see `quantizer_state`) of the quantizers in NVIDIA's metadata. Raises CheckpointError."""
    found = metadata.get("quantizer_state") if isinstance(metadata, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(
            'The step has no "quantizer_state"; it was not written by a version of the library that is known here.'
        )
    sequences: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    structure: dict[str, Any] = {}
    for name, state in found.items():
        if not isinstance(state, dict):
            raise CheckpointError(f'The state of the quantizer "{name}" is a {type(state).__name__}, not a mapping.')
        if state.get("is_sequential_quantizer"):
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf.isdigit():
            sequences.setdefault(parent, []).append((int(leaf), _convert(name, state)))
        else:
            structure[name] = {"quantizers": [_convert(name, state)]}
    for name, members in sequences.items():
        structure[name] = {"quantizers": [item for _, item in sorted(members, key=lambda pair: pair[0])]}
    return structure


def _convert(name: str, state: dict[str, Any]) -> dict[str, Any]:
    disabled = bool(state.get("_disabled", False))
    attributes = {
        ours: state[theirs] for theirs, ours in _KEYS.items() if not (state.get(theirs) is None or state[theirs] is False)
    }
    if "block_sizes" in attributes:  # the saved axis is then that of the tensor after it was cut into blocks
        attributes.pop("axis", None)
    if state.get("_dynamic"):
        attributes["type"] = "dynamic"
    config = None if disabled else QuantizerAttributeConfig.parse(attributes, name)
    buffers = state.get("_pytorch_state_metadata", {}).get("buffers", {})
    described = {}
    for key, spec in buffers.items():
        if key not in BUFFERS:
            raise CheckpointError(f'The quantizer "{name}" has a buffer "{key}" that is not known here.')
        described[key] = {"shape": [int(n) for n in spec["shape"]], "dtype": str(spec["dtype"]).removeprefix("torch.")}
    return {
        "format": None if config is None else str(config.to_format()),
        "enabled": not disabled,
        "clip_grad": not state.get("_pass_through_bwd", True),
        "config": None if config is None else config.to_json(),
        "buffers": described,
    }
