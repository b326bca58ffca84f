"""The attributes of one quantizer, and how NVIDIA's keys (or a `format`) become one string of the format algebra.

    {"num_bits": 8, "axis": 0}                                                          i8[1,...]*f32
    {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}                  e4m3[-1]~*f32
    {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}   e2m1[16]~*e4m3[...]*f32
    {"num_bits": 4, "format": "nvfp4"}                                                  e2m1[16]~*e4m3[...]*f32

Source of the keys and of their meaning: NVIDIA ModelOpt 0.47, `QuantizerAttributeConfig`; of the notation: docs/formats.md.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from modelopt.core.config import Config
from modelopt.core.errors import ConfigError, ModelOptError, did_you_mean
from modelopt.numerics.formats import Format, named, parse

FLOATS = ((4, 3), (5, 2), (2, 1), (1, 2), (0, 3), (3, 0), (3, 2), (2, 3))
BLOCK_KEYS = ("type", "scale_bits", "scale_block_sizes", "scale_rule", "four_over_six")
CALIBRATORS = ("max", "histogram")
CONSTANT_AMAX = 448.0
_FLOAT_NAME = re.compile(r"^e(\d)m(\d)$")


class QuantizerAttributeConfig(Config):
    """What one quantizer does. Keys that are not given keep NVIDIA's defaults; `format` is the short way to say the first five.

    Example:
        >>> str(QuantizerAttributeConfig.parse({"num_bits": 8, "format": "fp8"}).to_format())
        'e4m3[...]*f32'
    """

    format: str | None = None
    num_bits: int | tuple[int, int] | str = 8
    axis: int | tuple[int, ...] | None = None
    block_sizes: dict[int | str, Any] | None = None
    type: Literal["static", "dynamic"] = "static"
    unsigned: bool = False
    narrow_range: bool = False
    enable: bool = True
    effective_bits: float | None = None
    fake_quant: bool = True
    learn_amax: bool = False
    bias: dict[int | str, Any] | None = None
    trt_high_precision_dtype: Literal["Float", "Half", "BFloat16"] = "Float"
    calibrator: str | dict[str, Any] | tuple[Any, ...] = "max"
    rotate: bool | dict[str, Any] = False
    pass_through_bwd: bool = True
    backend: str | None = None
    backend_extra_args: dict[str, Any] | None = None
    use_constant_amax: bool = False
    constant_amax: float | None = None

    @classmethod
    def parse(cls, data: Any, where: str = "") -> QuantizerAttributeConfig:
        """Read attributes and check that they name a format. Raises ConfigError (contradiction, misspelled key or format)."""
        config = super().parse(data, where)
        try:
            config.to_format()
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from error
        except ModelOptError as error:
            raise ConfigError(f"{where or 'quantizer'}: {config.to_json()} names no format: {error}") from error
        return config

    @field_validator("num_bits", mode="before")
    @classmethod
    def _num_bits(cls, value: Any) -> Any:
        bits = _as_bits(value)
        if isinstance(bits, tuple) and bits not in FLOATS:
            raise ValueError(f"there is no {bits} float; known (exponent, mantissa) bits: {FLOATS}")
        if isinstance(bits, int) and not 2 <= bits <= 8:
            raise ValueError("integers have 2 to 8 bits")
        return bits

    @field_validator("block_sizes", "bias", mode="before")
    @classmethod
    def _dims(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {_as_dim(k): _as_bits(v) if k == "scale_bits" else v for k, v in value.items()}

    @field_validator("block_sizes")
    @classmethod
    def _blocks(cls, value: dict[int | str, Any] | None) -> dict[int | str, Any] | None:
        for key, size in (value or {}).items():
            if isinstance(key, str):
                _check_block_key(key, size)
            elif size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"the size {size!r} of dimension {key} is no positive integer (None means the whole dimension)")
        if value is not None and not any(isinstance(k, int) for k in value):
            raise ValueError("no dimension is given, for instance {-1: 16}")
        return value

    @field_validator("axis", mode="before")
    @classmethod
    def _axis(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("constant_amax")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < float("inf"):
            raise ValueError("must be positive and finite")
        return value

    @model_validator(mode="after")
    def _exclusive(self) -> QuantizerAttributeConfig:
        if self.axis is not None and self.block_sizes is not None:
            raise ValueError("axis and block_sizes exclude each other: a scale group is a channel or a block. Remove one")
        return self

    def to_format(self) -> Format:
        """Return the number format. Raises ConfigError where the keys contradict each other, FormatError or UnknownNameError."""
        given = self.model_fields_set
        if self.format is None:
            return parse(self._spell(self._element_from_bits()))
        base = named(self.format)
        if base.is_two_level or not base.block.whole:
            self._agree(base, given)
            return base
        self._agree(base, given & {"num_bits", "unsigned", "narrow_range"})
        if not given & {"axis", "block_sizes", "type"} or str(base) != f"{base.element}[...]*f32":
            self._agree(base, given)
            return base
        return parse(self._spell(base.element.name))

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were given, as plain JSON data."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def fixed_amax(self) -> float | None:
        """The amax that is given instead of measured, or None."""
        if self.constant_amax is not None:
            return self.constant_amax
        return CONSTANT_AMAX if self.use_constant_amax else None

    @property
    def bias_dims(self) -> tuple[int, ...] | None:
        """The dimensions over which the affine bias is averaged (negative), or None."""
        return None if self.bias is None else tuple(sorted(k for k in self.bias if isinstance(k, int)))

    def check_served(self, backends: tuple[str, ...] = ()) -> None:
        """Raise ConfigError for keys that parse and that no code of this version serves."""
        if self.backend is not None and self.backend not in backends:
            known = ", ".join(backends) or "none"
            raise ConfigError(
                f'The quantizer backend "{self.backend}" is not registered (registered: {known}). Remove "backend".'
            )
        if self.calibrator not in CALIBRATORS:
            hint = did_you_mean(str(self.calibrator), CALIBRATORS)
            raise ConfigError(
                f'"calibrator": {self.calibrator!r} is not served.{hint} Known: {", ".join(CALIBRATORS)}; '
                'other ways to find a range are algorithms: {"algorithm": "mse"}.'
            )
        if self.learn_amax:
            raise ConfigError('"learn_amax" is not served: amax is calibrated, not learned. Remove it.')
        if not self.fake_quant:
            raise ConfigError(
                '"fake_quant": False is not served in a config. Quantize, then call `compress(model)` for packed weights.'
            )
        if self.bias is not None:
            self._check_bias()
        if isinstance(self.rotate, dict):
            unknown = set(self.rotate) - {"enable", "mode", "rotate_fp32", "block_size"}
            if unknown or self.rotate.get("mode", "rotate") not in ("rotate", "rotate_back"):
                raise ConfigError(
                    f'"rotate": {self.rotate} is not served. Keys: enable, mode (rotate, rotate_back), rotate_fp32, block_size.'
                )

    def _check_bias(self) -> None:
        bias = self.bias or {}
        unknown = [k for k in bias if isinstance(k, str) and k not in ("type", "method")]
        if unknown or not self.bias_dims or any(k >= 0 for k in self.bias_dims):
            raise ConfigError(f'"bias": {bias} is not served. Give negative dimensions to average over, "type" and "method".')
        if bias.get("type", "static") != "static" or bias.get("method", "mean") != "mean":
            raise ConfigError(f'"bias": {bias} is not served: only the static mean is.')

    def _element_from_bits(self) -> str:
        bits = self.num_bits
        if isinstance(bits, str):
            raise ConfigError(f'num_bits "{bits}" is no number format. Give an integer, (exponent, mantissa), e4m3, or "format".')
        if isinstance(bits, tuple):
            if self.unsigned or self.narrow_range:
                raise ConfigError(
                    f"num_bits {bits} is a float, which is signed and has no narrow range. Remove unsigned and narrow_range."
                )
            return "e{}m{}".format(*bits)
        if self.unsigned:
            return f"u{bits}"
        return f"i{bits}n" if self.narrow_range else f"i{bits}"

    def _spell(self, element: str) -> str:
        """Return the algebra string of `element` at the granularity of axis, block_sizes and type."""
        sizes = self.block_sizes or {}
        if "type" in self.model_fields_set and sizes.get("type", self.type) != self.type:
            raise ConfigError(f'"type" is "{self.type}", and "{sizes["type"]}" inside block_sizes. Keep one of them.')
        mark = "~" if "dynamic" in (self.type, sizes.get("type")) else ""
        if self.block_sizes is None:
            return f"{element}{_axis_block(self.axis)}{mark}*f32"
        return f"{element}{_dims_block(sizes)}{mark}*{_scale(sizes)}"

    def _agree(self, base: Format, given: set[str]) -> None:
        """Raise where a key that is given beside `format` says something else than it."""
        element = base.element
        bits = self.num_bits
        same = element.bits == bits if isinstance(bits, int) else element.name == "e{}m{}".format(*bits)
        if "num_bits" in given and not same:
            raise ConfigError(
                f'"num_bits": {bits} contradicts "format": "{self.format}", whose values are {element.name} ({element.bits} '
                f'bits). Remove "num_bits", or name a format with such values.'
            )
        if self.unsigned and not element.name.startswith("u"):
            raise ConfigError(f'"unsigned": True contradicts "format": "{self.format}", whose values are {element.name}.')
        if self.narrow_range and not element.name.endswith("n"):
            raise ConfigError(f'"narrow_range": True contradicts "format": "{self.format}", whose values are {element.name}.')
        if "type" in given and (self.type == "dynamic") != base.dynamic:
            kind = "dynamic" if base.dynamic else "static"
            raise ConfigError(
                f'"type": "{self.type}" contradicts "format": "{self.format}", which is {kind} ({base}). Remove "type".'
            )
        if given & {"axis", "block_sizes", "type"} and (self.axis, self.block_sizes) != (None, None):
            spelled = self._spell(element.name)
            if parse(spelled) != base:
                raise ConfigError(
                    f'axis, block_sizes and type spell {spelled}, which contradicts "format": "{self.format}" ({base}). '
                    "Keep one of them."
                )


@functools.lru_cache(maxsize=256)
def _float_bits(text: str) -> tuple[int, int] | None:
    found = _FLOAT_NAME.match(text)
    return (int(found[1]), int(found[2])) if found else None


def _as_bits(value: Any) -> Any:
    """Bring the spellings of num_bits and scale_bits to an int, an (exponent, mantissa) tuple, or a name."""
    if isinstance(value, bool):
        raise ValueError("is a bool; give bits")
    if isinstance(value, list | tuple):
        if len(value) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ValueError(f"{value!r} is no pair (exponent bits, mantissa bits)")
        return tuple(value)
    if isinstance(value, str):
        return int(value) if value.isdigit() else _float_bits(value.lower()) or value
    return value


def _as_dim(key: Any) -> Any:
    """Dimension keys are integers; JSON and YAML files spell them as text."""
    return int(key) if isinstance(key, str) and re.fullmatch(r"-?\d+", key) else key


def _check_block_key(key: str, value: Any) -> None:
    if key not in BLOCK_KEYS:
        raise ValueError(
            f"unknown key '{key}'.{did_you_mean(key, BLOCK_KEYS)} Known: dimensions such as -1, {', '.join(BLOCK_KEYS)}"
        )
    if key == "type" and value not in ("static", "dynamic"):
        raise ValueError(f"type is {value!r}; it is 'static' or 'dynamic'")
    if key == "scale_rule" and not isinstance(value, str):
        raise ValueError(f"scale_rule is {value!r}; it is the name of a rule of docs/formats.md, such as 'fp8' or 'floor'")


def _axis_block(axis: int | tuple[int, ...] | None) -> str:
    """Spell the block of a channel axis: one scale per index along `axis`, shared by all other dimensions."""
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    if not axes:
        return "[...]"
    if max(axes) < 0:
        return "[...," + ",".join("1" if d in axes else "-1" for d in range(min(axes), 0)) + "]"
    if min(axes) < 0:
        raise ConfigError(f"axis {axis} counts from the front and from the end, which fits no notation. Count one way.")
    return "[" + ",".join("1" if d in axes else "-1" for d in range(max(axes) + 1)) + ",...]"


def _dims_block(sizes: dict[int | str, Any]) -> str:
    """Spell the trailing dimensions of a block; dimensions that are not named have block size 1, None is a whole dimension."""
    dims = {k: v for k, v in sizes.items() if isinstance(k, int)}
    if max(dims) >= 0:
        raise ConfigError(
            f"block_sizes {dims} counts from the front, which depends on the rank of a tensor. Use -1 for the last dimension."
        )
    return "[" + ",".join(str(-1 if (size := dims.get(d, 1)) is None else size) for d in range(min(dims), 0)) + "]"


def _scale(sizes: dict[int | str, Any]) -> str:
    """Spell the scale type of a block format."""
    bits = sizes.get("scale_bits")
    outer = sizes.get("scale_block_sizes")
    if sizes.get("four_over_six") and bits != (4, 3):
        raise ConfigError(f'"four_over_six" needs "scale_bits": (4, 3), got {bits}.')
    rule = sizes.get("scale_rule") or ("46" if sizes.get("four_over_six") else "")
    if rule and sizes.get("four_over_six") and rule != "46":
        raise ConfigError(f'"four_over_six" and "scale_rule": "{rule}" exclude each other. Remove one.')
    if rule and bits not in ((4, 3), (8, 0)):
        raise ConfigError(f'"scale_rule" needs "scale_bits": (4, 3) or (8, 0), got {bits}.')
    rule = rule and f":{rule}"
    if bits is None:
        return "f32"
    if bits == (8, 0):
        return f"e8m0{rule}"
    second = "[...]" if outer is None else _dims_block({_as_dim(k): v for k, v in outer.items()})
    if bits == (4, 3):
        return f"e4m3{rule}{second}*f32"
    if isinstance(bits, int):
        return f"i{bits}{second}*f32"
    raise ConfigError(f"scale_bits {bits} is not served. Known: (4, 3), (8, 0), an integer, or none for float32 scales.")
