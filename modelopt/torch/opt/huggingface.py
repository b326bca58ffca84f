"""Hugging Face directories: `modelopt.json` beside the weights, and the structure rebuilt before they are loaded.

`save_pretrained` and `load_pretrained` change nothing of transformers. `enable_huggingface_checkpointing()` teaches transformers'
own `save_pretrained` and `from_pretrained` the same, because the user asked for it; `disable_...` takes that back.
Transformers 5 builds a model on the meta device and hands it to `PreTrainedModel._load_pretrained_model`; that is the place
where the structure is rebuilt, so that devices, shards and types stay the business of its own loader.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.core.files import staged_directory
from modelopt.core.plugins import require
from modelopt.torch.opt import files
from modelopt.torch.opt.conversion import ModeloptStateManager, load_modelopt_state, modelopt_state, parse_state, replay
from modelopt.torch.opt.surgery import ORIGINAL, revert_class
from modelopt.torch.opt.tensors import fill_empty_buffers, gather, slots
from modelopt.torch.utils.network import unwrap_model

_HOOK = "_load_pretrained_model"
_SHOWN = 5
_originals: dict[str, Any] = {}


def _base_class() -> Any:
    require("transformers", "hf", "for Hugging Face checkpoints")
    from transformers import PreTrainedModel

    if not callable(getattr(PreTrainedModel, _HOOK, None)):
        raise ConfigError(
            "This version of transformers builds models in another way. Install transformers 5: pip install 'modelopt[hf]'"
        )
    return PreTrainedModel


def _state_path(load_config: Any, checkpoint_files: list[str] | None) -> Path | None:
    """Return where the modelopt.json of a model is: beside its weights, in its directory, or in its repository."""
    name = load_config.pretrained_model_name_or_path
    folders = [Path(checkpoint_files[0]).parent] if checkpoint_files else []
    if name is not None and os.path.isdir(name):
        folders.append(Path(name))
    for folder in folders:
        if (folder / files.STATE_FILE).is_file():
            return folder / files.STATE_FILE
    if name is None or os.path.exists(name):
        return None
    from transformers.utils.hub import cached_file

    options = load_config.download_kwargs or {}
    found = cached_file(name, files.STATE_FILE, _raise_exceptions_for_missing_entries=False, **options)
    return None if found is None else Path(found)


def _wrap_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `_load_pretrained_model` that rebuilds the structure first and refuses tensors that do not fit it."""

    @functools.wraps(original)
    def load(
        model: nn.Module, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        path = _state_path(load_config, checkpoint_files)
        # An exported directory tells its story in a modelopt.json too, but its tensors are those of a quantization_config.
        if path is None or load_config.hf_quantizer is not None:
            return original(model, state_dict, checkpoint_files, load_config, *args, **kw)
        dtype = getattr(model, "dtype", None)  # the one that the caller asked for
        if replay(model, parse_state(load_modelopt_state(path), where=str(path)), str(path)) is not model:
            raise CheckpointError(f"{path} holds a step that wraps the model, which transformers cannot load. Use `restore`.")
        _match_value_types(model, dtype)
        safetensors = [Path(f) for f in checkpoint_files or () if f.endswith(".safetensors")]
        source = files.TensorSource(safetensors)
        fill_empty_buffers(model, source.infos, "meta")
        _match_buffer_types(model, source)
        result = original(model, state_dict, checkpoint_files, load_config, *args, **kw)
        _check(model, result[0], path)
        return result

    load._modelopt = True  # type: ignore[attr-defined]
    return load


def _match_value_types(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Let modules that make values from codes (packed weights) make them in the type in which the model is loaded."""
    for module in model.modules():
        if dtype is not None and isinstance(vars(module).get("dtype"), torch.dtype) and not module._parameters:
            module.to(dtype)


def _match_buffer_types(model: nn.Module, source: files.TensorSource) -> None:
    """Give buffers the type of the file, as transformers loads into the type that the structure has."""
    for name, slot in slots(model).items():
        if name in source.infos and not slot.is_parameter and slot.tensor.device.type == "meta":
            slot.put(slot.tensor.to(source.infos[name].dtype))


def _check(model: Any, info: Any, path: Path) -> None:
    have = slots(model)
    loaded = {id(slot.tensor) for name, slot in have.items() if name not in info.missing_keys}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = sorted(n for n in info.missing_keys if n not in tied and n in have and id(have[n].tensor) not in loaded)
    found = [
        f"{len(names)} {kind}: {', '.join(map(str, names[:_SHOWN]))}"
        for kind, names in (
            ("missing from the file", missing),
            ("unknown to the model", sorted(info.unexpected_keys)),
            ("of another shape", sorted(name for name, *_ in info.mismatched_keys)),
        )
        if names
    ]
    if found:
        raise CheckpointError(
            f"The weights beside {path} do not fit the structure that it describes. Tensors {'; '.join(found)}."
        )


def _wrap_saver(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `save_pretrained` that writes modelopt.json too, and keeps our names and types of tensors."""

    @functools.wraps(original)
    def save(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kw: Any) -> Any:
        state_file = Path(save_directory) / files.STATE_FILE
        writes = kw.get("is_main_process", True)
        inner = unwrap_model(self)
        if not ModeloptStateManager.is_converted(inner):
            if writes:
                state_file.unlink(missing_ok=True)
            return original(self, save_directory, *args, **kw)
        text = json.dumps(modelopt_state(inner), indent=1)
        if writes:  # first, so that an upload at the end of the original function takes it along
            state_file.parent.mkdir(parents=True, exist_ok=True)
            state_file.write_text(text, encoding="utf-8")
        kw.setdefault("save_original_format", False)
        if kw.get("state_dict") is None and len(args) < 2:
            kw["state_dict"] = _state_dict(inner)
        return original(self, save_directory, *args, **kw)

    save._modelopt = True  # type: ignore[attr-defined]
    return save


def _state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict, with memory that transformers does not know to be tied copied apart."""
    tensors, aliases = gather(model)
    declared = set(getattr(model, "all_tied_weights_keys", {}) or {})
    declared |= set((getattr(model, "all_tied_weights_keys", {}) or {}).values())
    result: dict[str, Tensor] = dict(tensors)
    for name, first in aliases.items():
        result[name] = tensors[first] if {name, first} <= declared else tensors[first].clone()
    return result


def enable_huggingface_checkpointing() -> None:
    """Teach transformers' `save_pretrained` and `from_pretrained` about modelopt.json, for this process.

    Calling it twice does nothing more. A directory without modelopt.json loads as before.
    """
    base = _base_class()
    if _originals:
        return
    _originals.update({"save_pretrained": base.__dict__["save_pretrained"], _HOOK: base.__dict__[_HOOK]})
    base.save_pretrained = _wrap_saver(base.save_pretrained)
    setattr(base, _HOOK, staticmethod(_wrap_loader(getattr(base, _HOOK))))


def disable_huggingface_checkpointing() -> None:
    """Put transformers' own functions back. Nothing happens if they were not replaced."""
    base = _base_class() if _originals else None
    for name, value in _originals.items():
        setattr(base, name, value)
    _originals.clear()


def save_pretrained(model: Any, path: str | Path, overwrite: bool = False, **kwargs: Any) -> None:
    """Save a transformers model with its history: what transformers writes, and modelopt.json.

    The directory appears whole or not at all. `kwargs` go to transformers (`max_shard_size`, for instance).
    Raises CheckpointError if the directory is not empty and `overwrite` is not given.
    """
    base = _base_class()
    inner = unwrap_model(model)
    if not isinstance(inner, base):
        raise ConfigError(f"A {type(inner).__name__} is no transformers model; use modelopt.torch.opt.save.")
    write = type(inner).save_pretrained
    wrapped = write if getattr(write, "_modelopt", False) else _wrap_saver(write)
    with staged_directory(path, overwrite, last=files.STATE_FILE) as stage:
        wrapped(inner, stage, **kwargs)


def load_pretrained(path: str | Path, model_class: Any = None, **kwargs: Any) -> Any:
    """Load a transformers model that was saved with modelopt.json: structure, history and weights, bit for bit.

    `model_class` is needed only for classes outside transformers; `kwargs` go to `from_pretrained` (`dtype`, `device_map`, ...).

    Raises CheckpointError if the directory is incomplete, damaged or hostile.

        model = load_pretrained("out")
    """
    _base_class()
    if Path(path).is_dir() and not (Path(path) / files.STATE_FILE).is_file():
        raise CheckpointError(f"{path} has no {files.STATE_FILE}; it holds no optimized model. Load it with from_pretrained.")
    cls = _architecture(path, kwargs) if model_class is None else model_class
    own = getattr(cls, _HOOK)
    if getattr(own, "_modelopt", False):
        return _from_pretrained(cls, path, kwargs)
    body = {_HOOK: staticmethod(_wrap_loader(own)), "__module__": cls.__module__, "__qualname__": cls.__qualname__, ORIGINAL: cls}
    result = _from_pretrained(type(cls.__name__, (cls,), body), path, kwargs)
    revert_class(result[0] if isinstance(result, tuple) else result)
    return result


def _from_pretrained(cls: Any, path: str | Path, kwargs: dict[str, Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return cls.from_pretrained(path, **kwargs)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded: {error} Copy the whole directory again, or save the model again."
        ) from error


def _architecture(path: str | Path, kwargs: dict[str, Any]) -> Any:
    import transformers

    try:
        options = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "token", "trust_remote_code", "subfolder")}
        config = kwargs.get("config") or transformers.AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no configuration that transformers can read: {error}") from error
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"{path} was made by the class {names}, which transformers does not have. Pass model_class=.")
    return cls


__all__ = [
    "disable_huggingface_checkpointing",
    "enable_huggingface_checkpointing",
    "load_pretrained",
    "save_pretrained",
]
