"""What all rows have in common: scores in raw units, budgets, and Trainers that leave nothing behind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss
from torchmetrics import MeanSquaredError

from lightning_mtl import Task
from lightning_mtl.balanced import BalancedModule
from lightning_mtl.configured import ConfigurationError
from lightning_mtl.monitors import GradientConflict
from lightning_mtl.transfer.runs import metric_directions
from lightning_mtl.tuning import Setup, compare
from lightning_mtl.tuning.comparing.plan import Candidate, Training
from lightning_mtl.tuning.comparing.raw_units import RAW_LOSS, RawLoss, in_raw_units
from lightning_mtl.tuning.comparing.rows import EQUAL, STANDARDIZED, read_rows
from lightning_mtl.tuning.comparing.setups import ConfigSource, SetupSource, declare_anew, stripped
from lightning_mtl.tuning.comparing.trainings import train
from lightning_mtl.tuning.configuration import read_base
from tests.tuning.comparing.tiny import UNITS, data, model, setup, trainer
from tests.tuning.tiny import configuration

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
FEW: dict[str, Any] = {"methods": [], "rows": [], "seeds": 2, "lrs": [1e-2], "progress": False}


@pytest.mark.parametrize("name", [EQUAL, STANDARDIZED])
def test_a_regression_without_a_metric_is_scored_by_its_loss_in_raw_units(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``loss/<task>`` of standardized targets is another quantity than that of raw ones."""
    source = SetupSource(setup())
    rows, _ = read_rows(source.tasks, ["standardized"], [], 1)
    rows, directions = in_raw_units(source.tasks, metric_directions(source.tasks), rows)
    assert directions == {task: {RAW_LOSS: False} for task in UNITS}
    trained: list[BalancedModule] = []
    parts = source.parts

    def kept(rate: float, seed: int) -> Any:
        found = parts(rate, seed)
        trained.append(found.module)
        return found

    # The very module trains where all its tasks learn.
    monkeypatch.setattr(source, "parts", kept)
    monkeypatch.setattr("lightning_mtl.tuning.comparing.trainings.only_tasks", lambda module, tasks: module)
    row = next(row for row in rows if row.name == name)
    outcome = train(source, row, Training("compare", row.key, None, Candidate(0, 1e-2), 3))
    assert outcome.test is not None
    (module,) = trained
    ((inputs, targets),) = list(data(3)[2]) if len(data(3)[2]) == 1 else (_joined(data(3)[2]),)
    with torch.no_grad():
        predictions = module.eval()(inputs)
    for task, target in targets.items():
        raw = float(mse_loss(predictions[task], target))
        assert outcome.test[task][RAW_LOSS] == pytest.approx(raw, rel=1e-5)
        assert (outcome.test[task]["loss"] == pytest.approx(raw, rel=1e-5)) == (name == EQUAL)


def _joined(loader: Any) -> Any:
    batches = list(loader)
    inputs = torch.cat([batch[0] for batch in batches])
    return inputs, {task: torch.cat([batch[1][task] for batch in batches]) for task in UNITS}


def test_all_that_could_be_standardized_is_scored_so_and_compared_so_where_it_has_no_metric() -> None:
    tasks = {
        "bare": Task(l1_loss),
        "measured": Task(mse_loss, MeanSquaredError()),
        "standardized": Task(mse_loss, standardize=True),
        "classes": Task(nn.CrossEntropyLoss()),
    }
    rows, _ = read_rows(tasks, ["initial"], [], 1)
    changed, directions = in_raw_units(tasks, metric_directions(tasks), rows)
    assert {task: list(own) for task, own in directions.items()} == {
        "bare": [RAW_LOSS],
        "measured": ["MeanSquaredError"],
        "standardized": ["loss"],
        "classes": ["loss"],
    }
    assert {task for task, own in changed[0].changes.items() if "metrics" in own} == {"bare", "measured"}
    assert changed[1].changes["bare"]["loss_scale"] == "initial"  # what the row changes stays


def test_batches_of_any_size_make_one_mean() -> None:
    loss = functools.partial(huber_loss, delta=0.5)
    metric, prediction, target = RawLoss(loss), torch.randn(7, 2), torch.randn(7, 2)
    for part in (slice(0, 3), slice(3, 7)):
        metric.update(prediction[part], target[part])
    assert float(metric.compute()) == pytest.approx(float(loss(prediction, target)))


def test_trainers_leave_nothing_behind_and_all_rows_train_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer as Lightning makes it by default: it logs, keeps checkpoints, and here would stop at once."""
    monkeypatch.chdir(tmp_path)

    def made() -> pl.Trainer:
        stop = EarlyStopping("val/loss/total", patience=0, min_delta=1e9)
        return pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[stop, GradientConflict(figure=False)])

    callbacks: list[pl.Callback] = stripped(made()).callbacks  # type: ignore[attr-defined]
    assert callbacks == []
    source = SetupSource(Setup(model, data, made, lr=1e-2))
    rows, _ = read_rows(source.tasks, [], [], 1)
    outcome = train(source, rows[0], Training("compare", EQUAL, None, Candidate(0, 1e-2), 1))
    assert outcome.steps == 3 * 2
    assert not list(tmp_path.iterdir())


def test_a_configurations_weighting_is_a_row_and_what_needs_a_logger_is_left_out(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "GradNorm", "init_args": {"alpha": 0.7}},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss/total"}},
    ]
    result = compare(configuration(tmp_path, max_epochs=1, callbacks=callbacks), folder=tmp_path, **FEW)
    assert [row.name for row in result.rows] == [EQUAL, "GradNorm (configuration)"]
    assert not any(row.failed for row in result.rows)
    assert len(result.rows[1].scores) == 2


def test_a_seed_reaches_the_data_where_its_path_is_named(tmp_path: Path) -> None:
    source = ConfigSource(read_base(configuration(tmp_path)), None, "data.batch_size")
    assert [source.parts(0.1, seed).data.batch_size for seed in (3, 4)] == [3, 4]  # type: ignore[union-attr]
    other = ConfigSource(read_base({**configuration(tmp_path)}), None, None)
    assert source.identity() != other.identity()
    with pytest.raises(ConfigurationError, match=r"--seed-path data\.sed names no parameter"):
        ConfigSource(read_base(configuration(tmp_path)), None, "data.sed")


class Two(BalancedModule):
    """No trunk and no heads."""

    def __init__(self, lr: float) -> None:
        super().__init__({task: Task(mse_loss) for task in UNITS}, optimizer=functools.partial(torch.optim.Adam, lr=lr))
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def task_losses(self, batch: Any) -> Any:
        inputs, targets = batch
        found = self.net(inputs)
        return {task: mse_loss(found[:, place : place + 1], targets[task]) for place, task in enumerate(UNITS)}


def test_a_module_without_heads_is_compared_but_for_what_needs_them(tmp_path: Path) -> None:
    own = Setup(Two, data, trainer, lr=1e-2)
    result = compare(
        own, folder=tmp_path, **{**FEW, "rows": ["single", "standardized", "initial"], "methods": ["MGDA"]}
    )
    assert {row.name: len(row.scores) for row in result.rows if not row.failed} == {
        "single task": 2,
        EQUAL: 2,
        "1 / L(0)": 2,
        "MGDA": 2,
    }
    assert "has no head for 'small'" in next(row.failed for row in result.rows if row.name == STANDARDIZED)


def test_a_head_has_to_be_there_to_standardize() -> None:
    with pytest.raises(ValueError, match="Two has no head for 'small'"):
        declare_anew(Two(0.1), {"small": {"standardize": True}})
