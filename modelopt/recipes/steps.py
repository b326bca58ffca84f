"""From what a recipe writes to what `apply_mode` takes: names of presets become whole configurations.

config: nvfp4          config: {preset: nvfp4, kv_cache: fp8, skip: ["*lm_head*"]}          config: {quant_cfg: [...]}
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modelopt.core.config import Config
from modelopt.core.errors import ConfigError
from modelopt.recipes.load import Recipe
from modelopt.torch.opt.mode import new_mode
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.presets import get_config, update_quant_cfg_with_kv_cache_quant


class Shorthand(Config):
    """The short form of a quantize step: a scheme or preset, a KV-cache scheme, and modules to leave alone."""

    preset: str
    kv_cache: str | None = None
    skip: tuple[str, ...] = Field(default=())


def quantize_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """Return the whole configuration for any of the three forms. Raises UnknownNameError or ConfigError.

    >>> quantize_config({"preset": "fp8", "skip": ["*down_proj*"]})["quant_cfg"][-1]
    {'quantizer_name': '*down_proj*', 'enable': False}
    """
    if isinstance(config, str):
        return get_config(config)
    if "quant_cfg" in config:
        return config
    short = Shorthand.parse(config, "quantize step")
    whole = get_config(short.preset)
    if short.kv_cache is not None:
        whole = update_quant_cfg_with_kv_cache_quant(whole, short.kv_cache)
    whole["quant_cfg"] = [*whole["quant_cfg"], *({"quantizer_name": p, "enable": False} for p in short.skip)]
    return whole


def resolve_steps(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """Return (mode, configuration) of every step, each parsed once so that a mistake shows before any work.

    Raises UnknownNameError for a mode or a preset, ConfigError for a configuration.
    """
    found = []
    for i, step in enumerate(recipe.steps):
        mode = new_mode(QuantizeModeRegistry, step.mode)
        config = quantize_config(step.config) if step.mode == "quantize" else step.config
        if isinstance(config, str):
            raise ConfigError(f'steps[{i}]: "{config}" is no configuration of the mode "{step.mode}"; write a mapping.')
        mode.Config.parse(config, f"steps[{i}] ({step.mode})")
        found.append((step.mode, config))
    return found
