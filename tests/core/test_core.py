"""The ground floor: registries, matching, configuration, plugins, errors."""

from __future__ import annotations

import collections

import pytest
import yaml

from modelopt.core import errors
from modelopt.core.config import Config, load_json, load_yaml
from modelopt.core.errors import ConfigError, MissingDependencyError, ModelOptError, UnknownNameError, did_you_mean
from modelopt.core.match import Rules, matches, nearest_names
from modelopt.core.plugins import PluginTable, has, require
from modelopt.core.registry import Registry, TypeRegistry


def test_registry_imports_at_first_use_and_answers_misspellings():
    registry = Registry("thing", ordered="collections:OrderedDict")
    assert registry.get("ordered") is collections.OrderedDict
    with pytest.raises(UnknownNameError, match='no thing "orderd".*Did you mean "ordered"'):
        registry.get("orderd")
    registry.register("mine")(int)
    assert registry.get("mine") is int and list(registry) == ["mine", "ordered"] and len(registry) == 2
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("mine", str)
    registry.unregister("mine")
    assert "mine" not in registry
    with pytest.raises(UnknownNameError):
        registry.unregister("mine")


def test_type_registry_finds_the_nearest_class():
    class A: ...

    class B(A): ...

    class C(B): ...

    registry = TypeRegistry("wrapper")
    registry.register(A, "a")
    assert registry.match(C()) == "a"
    registry.register(f"{B.__module__}:{B.__qualname__}", "b")
    assert registry.match(C) == "b" and registry.match(A()) == "a" and registry.match(3) is None
    assert registry.match(C(), accept=lambda own, base: base is not B) == "a"
    with pytest.raises(ConfigError, match="already"):
        registry.register([A], "x")
    registry.unregister(B)
    assert registry.match(C()) == "a"


def test_rules_the_last_match_wins_and_default_is_weakest():
    rules = Rules.of([("*lm_head*", 8), ("*mlp*", 4), ("*mlp.up*", 2), ("default", 1)])
    assert [rules.resolve(n) for n in ("lm_head", "l.0.mlp.down", "l.0.mlp.up", "norm")] == [8, 4, 2, 1]
    assert rules.matching("l.0.mlp.up") == [1, 4, 2]
    assert rules.unmatched(["l.0.mlp.up"]) == ["*lm_head*"]
    assert Rules.of([("a*", 1)]).resolve("b") is None
    assert not matches("model.LM_head", "*lm_head*")


def test_a_pattern_that_matches_nothing_is_answered_with_near_names():
    names = ["model.layers.0.mlp.up_proj.weight_quantizer", "lm_head.input_quantizer"]
    assert any("lm_head" in n for n in nearest_names("*lm_haed*", names))


class Example(Config):
    bits: int = 8
    name: str = "x"


def test_config_is_frozen_and_refuses_unknown_keys():
    assert Example.parse({"bits": 4}).bits == 4
    with pytest.raises(ConfigError, match='unknown key "bit".*Did you mean "bits"'):
        Example.parse({"bit": 4})
    with pytest.raises(ConfigError, match='"bits"'):
        Example.parse({"bits": "many"}, where="recipe")
    with pytest.raises(ConfigError, match="expected a mapping"):
        Example.parse([1])
    with pytest.raises(ValueError, match="frozen"):
        Example().bits = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "safely"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: [", "safely"),
        ("[" * 200 + "]" * 200, "deep"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(file)


def test_json_and_yaml_files(tmp_path):
    file = tmp_path / "r.json"
    file.write_text('{"a": NaN}')
    with pytest.raises(ConfigError, match="NaN"):
        load_json(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_json(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_yaml(file)
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(tmp_path / "absent.yaml")
    file.write_text(yaml.safe_dump({"a": [1, {"b": 2}]}))
    assert load_yaml(file) == {"a": [1, {"b": 2}]}
    with file.open("w") as f:
        f.truncate(5 * 1024 * 1024)
    with pytest.raises(ConfigError, match="at most"):
        load_yaml(file)


def test_plugins_are_found_by_the_classes_of_objects():
    table = PluginTable({"collections": "json", "numpy": "no_such_module"})
    assert table.frameworks_of([collections.OrderedDict(), 3]) == ["collections"]
    assert table.load_for([collections.OrderedDict()])[0].__name__ == "json"
    with pytest.raises(ModuleNotFoundError):
        PluginTable({"collections": "no_such_module"}).load_for([collections.OrderedDict()])


def test_a_missing_package_names_its_extra():
    assert has("json") and not has("no_such_package.sub")
    with pytest.raises(MissingDependencyError, match=r'pip install "modelopt\[viz\]"'):
        require("no_such_package", "viz")
    assert require("json", "viz").dumps(1) == "1"


def test_every_error_is_a_modelopt_error_and_prints_its_message():
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) >= 11
    for kind in kinds:
        assert issubclass(kind, ModelOptError) and str(kind("what was seen")) == "what was seen"
    assert did_you_mean("zzz", ["abc"]) == ""
