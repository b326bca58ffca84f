"""Models of transformers from their configs, shrunk to two layers of width 64.

A name is "class:model_type", where the class says which head: causal, mlm, s2s, img, oth (as the list of 186 has it) or auto: the
first auto class that knows the type. Sub-configs are shrunk the same way. `transformers_specs.py` holds what else a type needs.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.zoo import Example
from benchmarks.zoo.guard import declare_torchvision_ops

declare_torchvision_ops()

import transformers  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from benchmarks.zoo.transformers_specs import CLASSES, COMMON, EXPERTS, FURTHER, HEADS, INPUTS, SPECIAL, VISION  # noqa: E402


def build(name: str) -> Example:
    """Create the model of a name and its inputs."""
    head, kind = name.split(":")
    config = listed_config(head, kind) if head != "auto" else small_config(CONFIG_MAPPING[kind], FURTHER.get(kind, {}), kind)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for part in [
        config,
        *(getattr(config, k) for k in getattr(config, "sub_configs", {}) if getattr(config, k, None) is not None),
    ]:
        part._experts_implementation = "eager"
    model = create(model_class(head, kind), config)
    return Example(model.eval(), (), inputs(model, head, kind, config))


def create(cls: Any, config: Any) -> Any:
    """Construct with eager attention where the class knows it."""
    try:
        return cls._from_config(config, attn_implementation="eager")
    except ValueError:
        return cls._from_config(config)


def model_class(head: str, kind: str) -> Any:
    """Return the class of a name."""
    if kind in CLASSES:
        return getattr(transformers, CLASSES[kind])
    for task in HEADS[head]:
        found = getattr(modeling_auto, f"MODEL{task}_MAPPING_NAMES").get(kind)
        if found is not None:
            return getattr(transformers, found[0] if isinstance(found, tuple) else found)
    config = CONFIG_MAPPING[kind]
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    found = [c for c in vars(module).values() if inspect.isclass(c) and getattr(c, "config_class", None) is config]
    if not found:
        raise KeyError(f"no class of transformers takes the config of {kind}")
    return min(found, key=lambda c: (not c.__name__.endswith("Model"), "PreTrained" in c.__name__, len(c.__name__)))


def listed_config(head: str, kind: str) -> Any:
    """Return the config of one of the 186: the common sizes where the config has such a field, then what the type needs."""
    cls = CONFIG_MAPPING[kind]
    base = cls()
    aliases = getattr(cls, "attribute_map", {})
    values = {k: v for k, v in COMMON.items() if k in base.__dict__ or k in aliases}
    for alias, real in aliases.items():
        if alias != real and real in values:
            values.pop(alias, None)
    if head == "img" or kind in ("clip", "siglip"):
        values |= {k: v for k, v in VISION.items() if hasattr(base, k)}
    if kind in ("swin", "swinv2", "convnext", "resnet", "regnet", "segformer", "mobilevit", "poolformer"):
        for k in ("hidden_size", "num_hidden_layers", "patch_size", "num_heads", "num_layers", "num_attention_heads", "d_model"):
            values.pop(k, None)
    if kind in ("swin", "swinv2"):
        values["patch_size"] = 4
    values |= SPECIAL.get(kind, {})
    if kind in ("convnext", "poolformer", "segformer"):
        values.pop("image_size", None)
    return cls(**values)


def small_config(cls: Any, changes: dict[str, Any], kind: str) -> Any:
    """Return a config of `cls` with the common sizes, sub-configs shrunk too; `changes` (nested for sub-configs) come last."""
    base = cls()
    aliases = getattr(cls, "attribute_map", {})
    common = COMMON | EXPERTS | (VISION if "image_size" in base.__dict__ else {})
    values: dict[str, Any] = {}
    for key, value in common.items():
        real = aliases.get(key, key)
        current = base.__dict__.get(real)
        if (
            isinstance(current, bool)
            or (key == "head_dim" and real in base.__dict__ and current is None)
            or (isinstance(current, int) and isinstance(value, int) and current > value)
            or key in ("use_cache",)
            or real in base.__dict__
            and key.endswith("_token_id")
            and real not in changes
        ):
            values[real] = value
    for key in getattr(cls, "sub_configs", {}):
        part = getattr(base, key, None)
        change = dict(changes.get(key, {}))
        if "model_type" in change:
            values[key] = CONFIG_MAPPING[change.pop("model_type")](**change).to_dict()
        elif part is not None:
            values[key] = small_config(type(part), change, kind).to_dict()
    types = getattr(base, "layer_types", None)
    layers = changes.get("num_hidden_layers", values.get(aliases.get("num_hidden_layers", "num_hidden_layers")))
    if types and layers:
        distinct = list(dict.fromkeys(types))
        values["layer_types"] = (distinct * layers)[:layers] if len(distinct) > 1 else types[:layers]
    values |= {k: v for k, v in changes.items() if k not in getattr(cls, "sub_configs", {})}
    return cls(**values)


def inputs(model: Any, head: str, kind: str, config: Any) -> dict[str, Any]:
    """Return keyword arguments for one forward pass."""
    ids = torch.randint(3, 32, (1, 16))
    takes = inspect.signature(model.forward).parameters
    if kind in INPUTS:
        return INPUTS[kind](config)
    found: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    if "input_ids" in takes:
        found["input_ids"] = ids
    if "pixel_values" in takes and ("input_ids" not in takes or head != "auto" or kind in ("vilt", "flava", "owlvit", "owlv2")):
        size = getattr(vision, "image_size", 64)
        size = size if isinstance(size, list | tuple) else (size or 64, size or 64)
        frames = (getattr(vision, "num_frames", 0) or 0,) if "num_frames" in vision.__dict__ else ()
        found["pixel_values"] = torch.randn(1, *frames, getattr(vision, "num_channels", 3) or 3, *size)
    if "input_values" in takes:
        found["input_values"] = torch.randn(1, 1600)
    if "input_features" in takes and "input_ids" not in takes:
        mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        found["input_features"] = torch.randn(1, mels, 64) if kind == "whisper" else torch.randn(1, 64, mels)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids[:, :8]
    if "bbox" in takes:
        found["bbox"] = torch.randint(0, 10, (1, 16, 4)).sort(-1).values
    if "use_cache" in takes and head != "s2s":
        found["use_cache"] = False
    return found
