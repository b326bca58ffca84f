"""A tiny language model with a byte-level tokenizer, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.tiny_llama import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama with two layers of width 64; read only."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")
