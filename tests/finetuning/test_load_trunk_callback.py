"""The callback that loads a trunk before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mtl import MultiTaskModule
from lightning_mtl.finetuning import LoadTrunk
from tests.finetuning.test_checkpoints import same, state, under, without
from tests.small import batch, heads, regressions, small, trunk
from tests.training import fit, loader


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_mtl.finetuning.checkpoints.rank_zero_info", lines.append)
    return lines


def test_the_callback_says_what_it_loaded(tmp_path: Path, said: list[str]) -> None:
    torch.save({"student": state(), "ema": under("module.", without("2.bias"))}, tmp_path / "two.pt")
    fit(small(), loader(batch(4)), callbacks=[LoadTrunk(tmp_path / "two.pt", strict=False, key="ema")])
    assert len(said) == 1
    assert said[0].startswith("LoadTrunk: 3 tensors loaded from keys 'module.*' of 'ema', 1 missing")
    assert said[0].endswith(f"from {tmp_path / 'two.pt'}; missing: 2.bias.")


def test_the_callback_loads_before_training_and_not_on_resume(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "trunk.pt")
    model = MultiTaskModule(trunk(), heads(), regressions(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    callback = LoadTrunk(tmp_path / "trunk.pt")
    trainer = fit(model, loader(batch(8)), callbacks=[callback])
    assert same(model.trunk, state())
    assert callback.report is not None
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "trunk.pt").unlink()
    fit(
        model,
        loader(batch(8)),
        callbacks=[LoadTrunk(tmp_path / "trunk.pt")],
        max_epochs=2,
        ckpt_path=tmp_path / "run.ckpt",
    )
    with pytest.raises(FileNotFoundError, match="no file"):
        fit(model, loader(batch(8)), callbacks=[LoadTrunk(tmp_path / "trunk.pt")])
