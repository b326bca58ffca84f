"""The steps of quantization, as modes: what they do, what they remember, how their structure is rebuilt.

quantize    config: QuantizeConfig          state: {"quantizers": structure of every quantizer}
calibrate   config: {"algorithm": ...}      state: the same; also under NVIDIA's names, `max_calibrate` and so on
compress    config: CompressConfig          state: {"packed": description of every packed weight}
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from modelopt.core.config import Config
from modelopt.core.errors import ModeError
from modelopt.torch.calibration.executor import SPEC_KEY
from modelopt.torch.opt.mode import Mode, ModeTable
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import configure, decide, plan, replace_quant_module, revert_quant_module, rule_name
from modelopt.torch.quantization.foreign_state import quantizers_from_metadata
from modelopt.torch.quantization.nn.modules import QuantModule
from modelopt.torch.quantization.pack import CompressConfig, pack_weights, restore_packed
from modelopt.torch.quantization.presets import OFF_CLASSES, STANDARD_PATTERNS
from modelopt.torch.quantization.quantizer_state import apply_structure, packed_of, structure_of
from modelopt.torch.quantization.rules import warn_unknown_classes, warn_unmatched
from modelopt.torch.quantization.validate import check
from modelopt.torch.trace.sharing import KEY as SHARED_KEY


class QuantizeMode(Mode):
    """Insert quantizers, configure them by rules, and calibrate. On any failure the model is what it was."""

    name = "quantize"
    Config = QuantizeConfig

    def apply(self, model: nn.Module, config: QuantizeConfig, forward_loop: Any = None, **runtime: Any) -> nn.Module:
        """Check everything first, then convert and calibrate."""
        model_calib.check_algorithm(config.algorithm)
        planned = plan(model)
        decisions = decide(planned, config)
        check(planned, decisions, config, forward_loop is not None)
        warn_unmatched(config.rules, [rule_name(name) for name in decisions], STANDARD_PATTERNS)
        warn_unknown_classes(config.rules, [c for p in planned for c in p.classes], OFF_CLASSES)
        seen = SPEC_KEY in model.__dict__
        try:
            replace_quant_module(model)
            configure(model, decisions)
            model_calib.calibrate(model, config.algorithm, forward_loop, **runtime)
        except BaseException:
            revert_quant_module(model)
            if not seen:
                model.__dict__.pop(SPEC_KEY, None)
                model.__dict__.pop(SHARED_KEY, None)
            raise
        return model

    def state(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Describe every quantizer of the model as it is now."""
        return {"quantizers": structure_of(model)}

    def restore(self, model: nn.Module, config: Any, state: dict[str, Any]) -> nn.Module:
        """Insert quantizers and give them the described structure."""
        replace_quant_module(model)
        apply_structure(model, state["quantizers"])
        return model

    def import_state(self, config: dict[str, Any], metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read what NVIDIA's library stores for this step."""
        return config, {"quantizers": quantizers_from_metadata(metadata)}


class CalibrateConfig(Config):
    """An algorithm: its name, a mapping with the key "method", a list of these, or None."""

    algorithm: str | dict[str, Any] | list[Any] | None = "max"


class CalibrateMode(Mode):
    """Find the ranges of the quantizers of a quantized model again."""

    name = "calibrate"
    Config: ClassVar[type[Config]] = CalibrateConfig
    repeatable = True

    def apply(self, model: nn.Module, config: CalibrateConfig, forward_loop: Any = None, **runtime: Any) -> nn.Module:
        """Calibrate; the model must have quantizers."""
        if not any(isinstance(m, QuantModule) for m in model.modules()):
            raise ModeError("The model has no quantizers to calibrate. Call quantize(model, config, forward_loop) instead.")
        model_calib.check_algorithm(config.algorithm)
        model_calib.calibrate(model, config.algorithm, forward_loop, **runtime)
        return model

    def state(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Describe every quantizer of the model as it is now."""
        return {"quantizers": structure_of(model)}

    def restore(self, model: nn.Module, config: Any, state: dict[str, Any]) -> nn.Module:
        """Give the quantizers, which an earlier step inserted, the described structure."""
        apply_structure(model, state["quantizers"])
        return model

    def import_state(self, config: dict[str, Any], metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read what NVIDIA's library stores for a calibration step: its configuration is the algorithm."""
        return {"algorithm": config or None}, {"quantizers": quantizers_from_metadata(metadata)}


class NoCalibrateMode(CalibrateMode):
    """NVIDIA's name of the step that calibrates nothing."""

    name = "_no_calibrate"


class MaxCalibrateMode(CalibrateMode):
    """NVIDIA's name of max calibration."""

    name = "max_calibrate"


class MSECalibrateMode(CalibrateMode):
    """NVIDIA's name of weight-MSE calibration."""

    name = "mse_calibrate"


class CompressMode(Mode):
    """Replace quantized weights by packed codes and scales."""

    name = "compress"
    Config = CompressConfig
    repeatable = True

    def apply(self, model: nn.Module, config: CompressConfig, **runtime: Any) -> nn.Module:
        """Pack every enabled weight that a pattern allows."""
        pack_weights(model, config)
        return model

    def state(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Describe every packed weight."""
        return {"packed": packed_of(model)}

    def restore(self, model: nn.Module, config: Any, state: dict[str, Any]) -> nn.Module:
        """Replace the described weights by empty packed ones."""
        restore_packed(model, state["packed"])
        return model


_HERE = "modelopt.torch.quantization.mode"
QuantizeModeRegistry = ModeTable(
    "quantization mode",
    quantize=f"{_HERE}:QuantizeMode",
    calibrate=f"{_HERE}:CalibrateMode",
    compress=f"{_HERE}:CompressMode",
    max_calibrate=f"{_HERE}:MaxCalibrateMode",
    mse_calibrate=f"{_HERE}:MSECalibrateMode",
    _no_calibrate=f"{_HERE}:NoCalibrateMode",
)
