"""Stopping, checkpoints and mixing from a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_mtl import MultiTaskModule
from lightning_mtl.control import TaskCheckpoint, TaskEarlyStopping
from lightning_mtl.data import Adaptive, MultiTaskDataModule
from lightning_mtl.data.mixing import Mixing
from tests.control.adapting import TASKS, dataset
from tests.small import binary

CONFIG = """
seed_everything: 1
data:
  mixing: {class_path: lightning_mtl.data.Adaptive, init_args: {metric: accuracy, temperature: 2.0, floor: 0.1}}
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_mtl.control.TaskEarlyStopping
      init_args:
        metrics: {a: accuracy, b: loss}
        patience: {a: 1, b: 9}
        min_delta: 2.0
        then: {a: head_only}
        until: [b]
        regret: 5.0
    - class_path: lightning_mtl.control.TaskCheckpoint
      init_args: {metrics: error, compromise: mean_rank, dirpath: kept}
    - class_path: lightning_mtl.control.TaskCheckpoint
      init_args: {metrics: accuracy, compromise: tests.control.test_cli.worst, dirpath: worst}
"""


def worst(scores: dict[str, dict[str, float]]) -> float:
    return min(own["accuracy"] for own in scores.values())


class Model(MultiTaskModule):
    def __init__(self) -> None:
        made = binary(tasks=TASKS)
        super().__init__(made.trunk, dict(made.heads.items()), made.tasks)


class Data(MultiTaskDataModule):
    def __init__(self, mixing: Mixing) -> None:
        datasets = {task: dataset(task, 12, place) for place, task in enumerate(TASKS)}
        super().__init__(datasets, datasets, mixing=mixing, batch_size=4)


# Lightning 2.6 imports what the newest jsonargparse has renamed: nothing of ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_three_from_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "-c", "run.yaml"])
    cli = LightningCLI(Model, Data, save_config_callback=None)
    assert cli.datamodule.mixing == Adaptive("accuracy", temperature=2.0, floor=0.1)
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    stopping = next(callback for callback in callbacks if isinstance(callback, TaskEarlyStopping))
    assert stopping.done == ["a"]
    assert stopping.resting.head_only == {"a"}
    ranked, of_worst = (callback for callback in callbacks if isinstance(callback, TaskCheckpoint))
    assert str(ranked.compromise_path).startswith("kept")
    assert of_worst.compromise is worst
    assert Path(str(of_worst.compromise_path)).is_file()
