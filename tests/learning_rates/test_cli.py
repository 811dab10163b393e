"""Factors from a configuration file, and the optimizer argument's groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_mtl import MultiTaskModule
from lightning_mtl.training.schedulers import OptimizerCallable
from tests.small import batches, heads, regressions, trunk
from tests.training import loader

CONFIG = """
seed_everything: 1
model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}}
trainer:
  accelerator: cpu
  max_steps: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_mtl.learning_rates.TaskLearningRate
      init_args:
        factors:
          - {class_path: lightning_mtl.learning_rates.Importance, init_args: {weights: {a: 0.5}}}
          - {class_path: lightning_mtl.learning_rates.GradientNorm, init_args: {power: 0.5}}
        bounds: [0.1, 10]
"""


class Configured(MultiTaskModule):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__(trunk(), heads(), regressions(), optimizer=optimizer)

    def train_dataloader(self) -> Any:
        return loader(*batches(4, 4))


# Lightning 2.6 imports what the newest jsonargparse has renamed: nothing of ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_factors_from_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "-c", str(tmp_path / "run.yaml")])
    cli = LightningCLI(Configured, save_config_callback=None)
    assert [group["name"] for group in cli.trainer.optimizers[0].param_groups] == ["trunk", "head/a", "head/b"]
    metrics = cli.trainer.callback_metrics
    assert [float(metrics[f"lr/{task}"]) for task in ("a", "b")] == [0.125, 0.25]
