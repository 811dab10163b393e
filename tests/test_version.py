"""The package's version, which it says itself, and what it refuses with other packages' versions."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

import lightning_mtl
from lightning_mtl.training.checks import check_trainer
from tests.small import small

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
    assert f"\nversion: {lightning_mtl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_an_older_torch_has_no_fsdp2_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mtl.training.checks.FSDP2_ON_CPU", False)
    module = small()
    module.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(ValueError, match=r"FSDP2 on the CPU needs torch 2\.7 or later, found .*; use strategy='ddp'"):
        check_trainer(module, module.trainer)
