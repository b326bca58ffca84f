"""A tiny model directory, and the command line called as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.recipes.tiny_llama import write_tiny


class Done(NamedTuple):
    """What a command left: its exit code and its two outputs."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama with two layers of width 64; read only."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def modelopt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line and return how it ended."""
    from modelopt.cli import main

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        seen = capsys.readouterr()
        return Done(int(stop.value.code or 0), seen.out, seen.err)

    return run
