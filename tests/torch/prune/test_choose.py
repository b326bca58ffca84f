"""How many atoms stay, and which: shares, limits, multiples, tied families, and what cannot be met."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from modelopt.core.errors import ConfigError
from modelopt.torch.prune.choose import choose, make_groups
from modelopt.torch.prune.config import StructuredConfig, read_limit


@dataclass
class Family:
    name: str
    kind: str
    size: int
    first: int
    slots: tuple = ()
    least: int = 1

    @property
    def atoms(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.size))


@dataclass
class Tie:
    families: tuple[str, str]
    ratios: tuple[int, int] = (1, 1)


@dataclass
class Axes:
    families: tuple[Family, ...]
    tied: tuple[Tie, ...] = ()


A, B, C = Family("a.weight.0", "ffn", 64, 1), Family("b.weight.0", "channels", 32, 101), Family("c.weight.0", "ffn", 64, 201)
AXES = Axes((A, B, C))


def scores(axes: Axes, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f.name: rng.random(f.size) + 0.01 for f in axes.families}


def cost(drop: frozenset[int], name: str) -> float:
    return 160.0 - len(drop)


def pick(axes: Axes = AXES, table=None, **fields):
    config = StructuredConfig.parse(fields)
    groups = make_groups(axes, table or scores(axes), config)
    limits = {name: read_limit(name, value, 160.0) for name, value in config.constraints.items()}
    return choose(groups, config, cost, limits)


def test_a_share_of_every_family_and_the_least_important_of_each():
    table = scores(AXES)
    drop = pick(table=table, ratio=0.5)
    for family in AXES.families:
        gone = [a in drop for a in family.atoms]
        assert sum(gone) == family.size // 2
        assert table[family.name][gone].max() < table[family.name][~np.array(gone)].min()


def test_rules_by_kind_and_by_name_the_last_wins_and_the_rest_stays():
    drop = pick(ratio={"ffn": 0.5, "c.*": 0.25})
    assert [sum(a in drop for a in f.atoms) for f in AXES.families] == [32, 0, 16]
    drop = pick(ratio={"default": 0.25, "b.*": 0.5}, exclude=("a.*",))
    assert [sum(a in drop for a in f.atoms) for f in AXES.families] == [0, 16, 16]


def test_survivors_are_multiples_rounded_up():
    drop = pick(ratio=0.4, multiple_of=16)
    assert [f.size - sum(a in drop for a in f.atoms) for f in AXES.families] == [48, 32, 48]


def test_tied_families_keep_the_same_number_each_its_own():
    families = (Family("q", "heads", 8, 1), Family("k", "heads", 8, 11), Family("v", "heads", 8, 21))
    axes = Axes(families, (Tie(("k", "v")), Tie(("q", "v"))))
    table = scores(axes)
    table["q"] = table["q"] + 100
    drop = pick(axes, table, constraints={"params": 150}, ranking="global")
    kept = [sum(a in drop for a in f.atoms) for f in families]
    assert kept[0] == kept[1] == kept[2] > 0


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_constraint_is_met_and_hardly_more(ranking):
    drop = pick(constraints={"params": "60%"}, ranking=ranking)
    assert 60 <= len(drop) <= 70


def test_global_ranking_compares_families():
    table = {**scores(AXES), B.name: np.full(32, 1.0), A.name: np.concatenate([np.full(32, 1e-3), np.full(32, 10.0)])}
    drop = pick(table=table, ratio=0.2, ranking="global")
    assert set(A.atoms[:32]) <= drop


def test_ties_in_a_global_ranking_take_no_more_than_was_asked():
    table = {f.name: np.ones(f.size) for f in AXES.families}
    assert len(pick(table=table, ratio=0.1, ranking="global")) == 16
    assert 60 <= len(pick(table=table, constraints={"params": 100}, ranking="global")) <= 66


def test_what_cannot_be_met_says_the_least_that_can():
    with pytest.raises(ConfigError, match=r"cannot be met.*least is 1[0-9]\b"):
        pick(constraints={"params": "1%"})
    with pytest.raises(ConfigError, match="least is 80"):
        pick(constraints={"params": 10}, ratio=0.5)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 1.5])
def test_shares_lie_inside_zero_and_one(bad):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        StructuredConfig.parse({"ratio": bad})
    with pytest.raises(ConfigError, match="between 0 and 1"):
        StructuredConfig.parse({"ratio": {"ffn": bad}})


def test_unknown_families_and_costs_get_a_hint():
    with pytest.raises(ConfigError, match=r'matches "fnn".*Did you mean "ffn"'):
        pick(ratio={"fnn": 0.5})
    with pytest.raises(ConfigError, match=r'Did you mean "flops"'):
        StructuredConfig.parse({"constraints": {"flop": "60%"}})


@pytest.mark.parametrize("limit", ["0%", "100%", "sixty", "60", -1, 0])
def test_limits_that_mean_nothing(limit):
    with pytest.raises(ConfigError, match="constraint"):
        read_limit("params", limit, 100.0)
