"""What only transformers knows: the names that a model's tensors have in a checkpoint, and how a model is built from one.

In memory transformers 5 renames and fuses (experts become one 3-D tensor); files keep the original names. Its own reverse mapping
is run on small probe tensors, whose values say where each piece went.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError
from modelopt.core.plugins import require


def is_pretrained(model: nn.Module) -> bool:
    """Return whether `model` is a transformers model. Imports nothing."""
    return any(c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel" for c in type(model).__mro__)


def revert_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` under the names, and split into the pieces, that a checkpoint of this model has."""
    if not is_pretrained(model) or not tensors:
        return dict(tensors)
    loading = require("transformers.core_model_loading", "hf")
    return dict(loading.revert_weight_conversion(model, dict(tensors)))


def layer_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return the checkpoint's name of each module in `names` (modules with a `weight` of two dimensions)."""
    probes = {f"{name}.weight": torch.full((1, 1), float(i)) for i, name in enumerate(names)}
    found = {}
    for key, value in revert_names(model, probes).items():
        found[names[int(value.reshape(-1)[0])]] = key.removesuffix(".weight")
    return {name: found.get(name, name) for name in names}


def expert_names(model: nn.Module, parameter: str, experts: int, parts: int) -> list[list[str]] | None:
    """Return the checkpoint's module names of each expert of the fused `parameter` [E, parts * .., ..], or None.

    `parts` is 2 for a gate and an up projection in one tensor. None: the checkpoint keeps it fused, or splits it otherwise.
    """
    if not is_pretrained(model):
        return None
    ids = torch.arange(experts * parts, dtype=torch.float32).reshape(experts, parts, 1)
    pieces = revert_names(model, {parameter: ids})
    names: dict[int, str] = {}
    for key, value in pieces.items():
        if value.numel() != 1 or not key.endswith(".weight"):
            return None
        names[int(value.reshape(-1)[0])] = key.removesuffix(".weight")
    if len(names) != experts * parts:
        return None
    return [[names[e * parts + p] for p in range(parts)] for e in range(experts)]


def config_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's configuration as JSON: architectures always named, no quantization, `dtype` as given."""
    config = getattr(model, "config", None)
    if not is_pretrained(model) or config is None:
        return {}
    data = dict(config.to_dict())
    for key in ("quantization_config", "_name_or_path", "torch_dtype"):
        data.pop(key, None)
    # A model built from a configuration has none yet, and without it no one can build the model again.
    data["architectures"] = data.get("architectures") or [_class_name(model)]
    data["dtype"] = str(dtype).removeprefix("torch.")
    return data


def _class_name(model: nn.Module) -> str:
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers."):
            return cls.__name__
    return type(model).__name__


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the transformers class that `architectures` names. Raises CheckpointError."""
    transformers = require("transformers", "hf")
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else []:
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    raise CheckpointError(f"config.json names the architectures {names}, none of which is a model of the installed transformers.")


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build the model that `config` describes and load `tensors` (checkpoint names). Raises CheckpointError on any mismatch."""
    transformers = require("transformers", "hf")
    cls = model_class(config)
    invalid = require("huggingface_hub.errors", "hf").StrictDataclassError
    # The attention's implementation is the reader's choice: a name with a slash would fetch a kernel from the Hub and run it.
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "attn_implementation", "_attn_implementation")}
    _refuse_huge(plain, tensors)
    try:
        typed = transformers.AutoConfig.for_model(**plain)
        model, info = cls.from_pretrained(None, config=typed, state_dict=dict(tensors), dtype=dtype, output_loading_info=True)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, ImportError, ArithmeticError, invalid) as error:
        raise CheckpointError(f"config.json and the tensors make no {cls.__name__}: {error}") from error
    bad = {key: sorted(map(str, info.get(key) or ()))[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    bad = {key: value for key, value in bad.items() if value}
    if bad:
        raise CheckpointError(f"The tensors do not fit {cls.__name__}: {bad}. Is this a checkpoint of another architecture?")
    return model.eval()


def _refuse_huge(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for more layers than there are tensors: building them would take hours and all memory."""
    for key, value in config.items():
        count = value if isinstance(value, int) and "layers" in key else 0
        if count > max(len(tensors), 1000):
            raise CheckpointError(f"config.json says {key} = {count}, and the checkpoint has {len(tensors)} tensors.")
        if isinstance(value, Mapping):
            _refuse_huge(value, tensors)


def source_of(model: nn.Module) -> Path | None:
    """Return the local directory from which the model was loaded, or None."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    path = Path(name) if isinstance(name, str) and name else None
    return path if path is not None and (path / "config.json").is_file() else None
