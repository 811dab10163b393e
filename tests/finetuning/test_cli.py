"""A trunk's weights and a freezing schedule from a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_mtl import MultiTaskModule
from lightning_mtl.finetuning import GradualUnfreezing, LoadTrunk
from lightning_mtl.training.schedulers import OptimizerCallable
from tests.small import batches, heads, regressions, trunk
from tests.training import loader

CONFIG = """
seed_everything: 1
model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: LoadTrunk
      init_args: {path: FILE}
    - class_path: GradualUnfreezing
      init_args:
        schedule: {1: trunk.2, 2: [trunk.0]}
        lr_decay: 0.5
"""


class Configured(MultiTaskModule):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__(trunk(), heads(), regressions(), optimizer=optimizer)

    def train_dataloader(self) -> Any:
        return loader(*batches(4, 4))


# Lightning 2.6 imports what the newest jsonargparse has renamed: nothing of ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fine_tuning_from_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = trunk().state_dict()
    torch.save(pretrained, tmp_path / "trunk.pt")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("FILE", str(tmp_path / "trunk.pt")))
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "-c", str(tmp_path / "run.yaml")])
    cli = LightningCLI(Configured, save_config_callback=None)
    loading, unfreezing = cli.trainer.callbacks[:2]  # type: ignore[attr-defined]
    assert isinstance(loading, LoadTrunk)
    assert isinstance(unfreezing, GradualUnfreezing)
    assert unfreezing.schedule == {1: ("trunk.2",), 2: ("trunk.0",)}
    groups = cli.trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("trunk/2", 0.125),
        ("trunk/0", 0.0625),
        ("head/a", 0.25),
        ("head/b", 0.25),
    ]
    assert all(torch.equal(value, pretrained[key]) for key, value in cli.model.trunk.state_dict().items())
