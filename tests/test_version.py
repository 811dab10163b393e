"""The package's version has one source, the package itself."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import lightning_mtl

ROOT = Path(__file__).parent.parent


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", not_installed)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("lightning-mtl")
    names = runpy.run_path(str(Path(lightning_mtl.__file__)))
    assert names["__version__"] == lightning_mtl.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", lightning_mtl.__version__)


def test_the_citation_names_it() -> None:
    assert f"{{Version {lightning_mtl.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
