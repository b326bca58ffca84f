"""Reading recipes: strict, safe, and without torch.

    model: path or id                                                     steps: [{mode: quantize, config: ...}, ...]
    calibration: {source, num_samples, length, batch_size}                evaluate: the same keys
    export: {layout: hf | compressed-tensors | modelopt | auto, directory, max_shard_size}

The `config` of a quantize step is a scheme or preset name, a mapping `{preset, kv_cache, skip}`, or a whole configuration.
What a stranger's file must not decide is no key here: running code that comes with a model, replacing a directory, writing
outside the working directory. Those are options of the command line.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import Field, field_validator

from modelopt.core.config import Config, load_yaml
from modelopt.core.errors import ConfigError, did_you_mean

MAX_SAMPLES = 1_000_000
MAX_LENGTH = 1_048_576
MAX_STEPS = 100


class Text(Config):
    """Which text, cut into how many windows of how many tokens, how many windows at a time."""

    source: str | tuple[str, ...] = "pydoc"
    num_samples: int = Field(default=64, ge=1, le=MAX_SAMPLES, strict=True)
    length: int = Field(default=512, ge=2, le=MAX_LENGTH, strict=True)
    batch_size: int = Field(default=1, ge=1, le=MAX_SAMPLES, strict=True)


class Evaluation(Text):
    """Text for the comparison with the original; at least 4096 scored tokens by default."""

    num_samples: int = Field(default=9, ge=1, le=MAX_SAMPLES, strict=True)


class Step(Config):
    """One step: a mode and its configuration, as `apply_mode` takes it and as a checkpoint keeps it."""

    mode: str
    config: str | dict[str, Any] = Field(default_factory=dict)


class Export(Config):
    """Which layout, and where. `auto` takes the first layout that can hold the model; `verify`: another library reads it back."""

    layout: str = "auto"
    directory: str | None = None
    max_shard_size: str | int = "10GB"
    verify: bool = True

    @field_validator("directory")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = PurePosixPath(value.replace("\\", "/"))
        if (
            not value.strip()
            or "\0" in value
            or path.is_absolute()
            or ".." in path.parts
            or value.startswith("~")
            or ":" in value
        ):
            raise ValueError("a recipe writes below the working directory only; name another place with --out")
        return value


class Recipe(Config):
    """A whole job."""

    description: str = ""
    model: str | None = None
    dtype: str = "auto"
    steps: tuple[Step, ...] = Field(min_length=1, max_length=MAX_STEPS)
    calibration: Text = Field(default_factory=Text)
    export: Export = Field(default_factory=Export)
    evaluate: Evaluation | None = None


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Check plain data and return the recipe. Raises ConfigError that names the key, with the nearest known one.

    >>> parse_recipe({"steps": [{"mode": "quantize", "config": "nvfp4"}]}).steps[0].config
    'nvfp4'
    """
    if isinstance(data, dict):
        _check_keys(data, where)
    return Recipe.parse(data, where)


def _check_keys(data: dict[Any, Any], where: str) -> None:
    """Refuse unknown keys at both levels, each with the names of its own level."""
    levels: list[tuple[str, Any, type[Config]]] = [("", data, Recipe)]
    levels += [("calibration", data.get("calibration"), Text), ("evaluate", data.get("evaluate"), Evaluation)]
    levels += [("export", data.get("export"), Export)]
    steps = data.get("steps")
    levels += [(f"steps[{i}]", step, Step) for i, step in enumerate(steps if isinstance(steps, list) else ())]
    for place, value, kind in levels:
        for key in value if isinstance(value, dict) else ():
            if key not in kind.model_fields:
                known = list(kind.model_fields)
                at = f" in {place}" if place else ""
                raise ConfigError(
                    f'{where}: unknown key "{key}"{at}.{did_you_mean(str(key), known)} Known keys: {", ".join(known)}.'
                )


def builtin_recipes() -> dict[str, str]:
    """Return the recipes that come with the package: name (`general/nvfp4`) -> description."""
    root = resources.files("modelopt.recipes")
    found = {}
    for folder in sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("_")):
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".yaml"):
                name = f"{folder.name}/{file.name.removesuffix('.yaml')}"
                found[name] = str(yaml.safe_load(file.read_text(encoding="utf-8")).get("description", ""))
    return found


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe file, or one of `builtin_recipes()` by its name. Raises ConfigError.

    >>> load_recipe("general/nvfp4").steps[0].mode
    'quantize'
    """
    path = Path(name)
    if path.is_file():
        return parse_recipe(load_yaml(path), str(path))
    known = builtin_recipes()
    if str(name) in known:
        with resources.as_file(resources.files("modelopt.recipes") / f"{name}.yaml") as file:
            return parse_recipe(load_yaml(file), str(name))
    raise ConfigError(
        f"There is no recipe file {name}.{did_you_mean(str(name), known)} Recipes of the package: {', '.join(known)}."
    )


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML that `load_recipe` reads back; the output directory is left out, so that it can be used again."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    data["export"].pop("directory", None)
    if not data["description"]:
        del data["description"]
    return yaml.dump(data, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)


class _Plain(yaml.SafeDumper):
    """A dumper that never writes an alias, which the reader would refuse."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
