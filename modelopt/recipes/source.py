"""Where a job's model comes from: a directory or a Hub id, its headers, its class on the meta device, and the model itself.

Nothing here reads weights except `load_model`. Code that comes with a model runs only where the caller says so.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import CheckpointError, ConfigError, ModeError, ModelOptError
from modelopt.core.plugins import require
from modelopt.torch.export.readers.files import Tensors, read_json

_HUB_ID = re.compile(r"^[\w.\-]+/[\w.\-]+$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Source:
    """A checkpoint directory: its configuration, and name -> (shape, dtype of the safetensors header, bytes) of its tensors."""

    name: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str, int]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes for _, _, nbytes in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that the configuration names, or that most bytes have."""
        named = _DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype") or ""))
        counts: dict[str, int] = {}
        for _, dtype, nbytes in self.tensors.values():
            counts[dtype] = counts.get(dtype, 0) + nbytes
        most = max(counts, key=lambda d: counts[d], default="F32")
        return named or _STORED.get(most, torch.float32)


def find_model(name: str, weights: bool = True) -> Path:
    """Return the local directory of a model: `name` itself, or a snapshot of the Hub id. Raises CheckpointError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; a model is a directory with config.json and safetensors files.")
    if not _HUB_ID.match(name) or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"There is no model directory {name}. Give a directory with config.json, or an id such as org/name."
        )
    hub = require("huggingface_hub", "hf", "to fetch a model")
    ignore = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]
    try:
        return Path(hub.snapshot_download(name, ignore_patterns=ignore))
    except (OSError, ValueError) as error:  # the Hub's errors derive from these two
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"There is no directory {name}, and it could not be fetched as a Hub id: {reason}") from error


def open_source(name: str) -> Source:
    """Find a model and read its configuration and headers. Raises CheckpointError for what is missing, truncated or corrupt."""
    directory = find_model(name)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; it is not a Hugging Face model directory.")
    files = Tensors(directory)
    tensors = {}
    for key in files:
        shape, dtype = tuple(files.shape(key)), files.dtype(key)
        tensors[key] = (shape, dtype, math.prod(shape) * _BYTES.get(dtype, 1))
    return Source(name, directory, read_json(directory / "config.json"), tensors)


def open_config(directory: Path) -> Source:
    """Read the configuration of a directory that may hold no weights. Raises CheckpointError if it has no config.json."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; it is not a Hugging Face model directory.")
    return Source(str(directory), directory, read_json(directory / "config.json"), {})


def require_plain(source: Source) -> None:
    """Raise ModeError if the checkpoint is quantized already."""
    quantization = source.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModeError(f"{source.name} is quantized already ({method}). Start from the original model.")
    if (source.directory / "modelopt.json").is_file():
        raise ModeError(f"{source.name} was optimized already (it has a modelopt.json). Start from the original model.")


def compute_dtype(source: Source, dtype: str) -> torch.dtype:
    """Return the type called `dtype`; "auto" is the stored one. Raises ConfigError."""
    if dtype == "auto":
        return source.dtype
    if dtype not in _DTYPES:
        raise ConfigError(f'"{dtype}" is no dtype to compute in. Choose auto, {", ".join(_DTYPES)}.')
    return _DTYPES[dtype]


def compute_device(device: str) -> torch.device:
    """Return a device that exists; "auto" is a GPU if there is one. Raises ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'"{device}" is no device. Choose auto, cpu, cuda or cuda:N.') from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'"{device}" was asked for, and {torch.cuda.device_count()} CUDA devices are present. Choose cpu or auto.'
        )
    return chosen


def _model_class(source: Source, trust_remote_code: bool) -> Any:
    transformers = require("transformers", "hf", "to build the model")
    names = source.config.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if source.config.get("auto_map") and not trust_remote_code:
        raise CheckpointError(f"{source.name} brings its own Python code. Read it, then allow it with --trust-remote-code.")
    if names and not trust_remote_code:
        raise CheckpointError(
            f"{source.name} has the architecture {names}, which transformers {transformers.__version__} does not know."
        )
    return transformers.AutoModelForCausalLM


@contextlib.contextmanager
def _explained(source: Source, doing: str) -> Iterator[None]:
    """Turn what transformers raises about a bad directory into a CheckpointError of one line."""
    try:
        yield
    except ModelOptError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source.name}: {doing} failed ({type(error).__name__}): {reason}") from error


def meta_model(source: Source, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a checkpoint on the meta device: structure and shapes, no memory."""
    transformers = require("transformers", "hf", "to build the model")
    cls = _model_class(source, trust_remote_code)
    with _explained(source, "building the model from config.json"):
        config = transformers.AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            own = hasattr(cls, "_from_config")
            model = (
                cls._from_config(config, dtype=dtype)
                if own
                else cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            )
    return model.eval()


def load_model(source: Source, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """Load a model for evaluation. Raises CheckpointError for weights that are missing or do not fit."""
    transformers = require("transformers", "hf", "to load the model")
    cls = _model_class(source, trust_remote_code)
    more = {"trust_remote_code": True} if trust_remote_code else {}
    with _quiet_transformers(transformers), _explained(source, "loading the weights"):
        model, info = cls.from_pretrained(source.directory, dtype=dtype, output_loading_info=True, **more)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = sorted(str(k) for k in info.get("missing_keys") or () if k not in tied)
    other = sorted(str(k) for k in info.get("mismatched_keys") or ())
    if missing or other:
        what = (
            f"lacks {len(missing)} tensors ({', '.join(missing[:3])})"
            if missing
            else f"has other shapes ({', '.join(other[:3])})"
        )
        raise CheckpointError(f"{source.name} {what} for {type(model).__name__}. Fetch it again, or correct its config.json.")
    return model.eval().to(device)


@contextlib.contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """Silence transformers' own reports and bars while we load; what is wrong is said by our errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in the directory. Raises CheckpointError if there is none."""
    transformers = require("transformers", "hf", "to load the tokenizer")
    with _quiet_transformers(transformers), _explained(source, "loading the tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)


def check_directory(name: str) -> Path:
    """Return the path of a local checkpoint directory. Raises CheckpointError if it is none."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"There is no directory {name}. Give a directory that modelopt quantize wrote.")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json; it is not the directory of a model.")
    return path


def open_quantized(path: Path) -> Any:
    """Return what an exporter takes: a checkpoint of packed layers, or the model that was saved in this library's own form."""
    from modelopt.torch.export.readers.model import read
    from modelopt.torch.opt.huggingface import load_pretrained

    if own_form(path):
        return load_pretrained(path)
    return read(path)


def own_form(path: Path) -> bool:
    """Return whether a directory holds a model in this library's own form: weights as they were, and its history."""
    return (path / "modelopt.json").is_file() and not read_json(path / "config.json").get("quantization_config")


def load_any(path: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Load a directory for comparison: quantized in any layout that there is a reader for, our own form, or plain."""
    from modelopt.torch.export.readers.model import load
    from modelopt.torch.opt.huggingface import load_pretrained

    config = read_json(path / "config.json")
    transformers = require("transformers", "hf", "to load the model")
    with _quiet_transformers(transformers):
        if config.get("quantization_config") or (path / "hf_quant_config.json").is_file():
            return load(path, mode="fake", dtype=dtype).eval()
        if (path / "modelopt.json").is_file():
            return load_pretrained(path, dtype=dtype or "auto").eval()
    source = open_source(str(path))
    return load_model(source, dtype or source.dtype, torch.device("cpu"), trust_remote_code)


_SAME = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def require_same_architecture(one: Path, other: Path) -> None:
    """Raise CheckpointError, naming the first difference, unless two directories hold models of one architecture and size."""
    a, b = read_json(one / "config.json"), read_json(other / "config.json")
    for key in _SAME:
        if a.get(key) != b.get(key):
            raise CheckpointError(
                f"{one} and {other} are different models: {key} is {a.get(key)} and {b.get(key)}. "
                "Compare a quantized model with the original that it was made from."
            )
