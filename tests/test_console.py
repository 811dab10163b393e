"""What a fit and a series of fits print: a table in the end, a summary with a row a head, one display for many."""

from __future__ import annotations

import io
import re
import shlex
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torchmetrics import R2Score

from lightning_mtl.monitors import FitTable
from lightning_mtl.monitors.fit_table import FitReport
from lightning_mtl.monitors.model_summary import TaskSummary
from lightning_mtl.transfer import single_task_baselines
from lightning_mtl.transfer.progress import Progress, quiet
from lightning_mtl.weighting import StaticWeights
from tests.small import batch, binary, small
from tests.training import Memory, fit, loader, quiet_trainer


def printed(capsys: pytest.CaptureFixture[str], module: Any = None, *, val: bool = True, **arguments: Any) -> str:
    data = loader(batch())
    fit(module or binary(), data, data if val else None, enable_progress_bar=True, **arguments)
    return capsys.readouterr().out


def rows(text: str) -> dict[str, list[str]]:
    lines = text.partition("After ")[2].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in lines if line[:2] in ("a ", "b ")}


def test_a_fit_ends_with_a_table_of_what_was_logged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module = binary()
    module.tasks["a"].baseline = {"accuracy": 0.5}
    logger = TensorBoardLogger(str(tmp_path / "a b"), name="", version="run")
    callbacks = [StaticWeights({"a": 0.5}), TQDMProgressBar()]
    trainer_module = module
    found = printed(capsys, trainer_module, callbacks=callbacks, logger=logger)
    assert "After 1 epoch, 1 step\n" in found
    logged = module.trainer.callback_metrics
    wanted = ("loss_epoch", "val/loss", "val/accuracy", "val/error", "weight")
    for task, values in rows(found).items():
        assert values == [f"{float(logged[f'{name}/{task}']):.4g}" for name in wanted]
    assert set(rows(found)) == {"a", "b"}
    assert f"{float(logged['val/delta_m']):+.1f} %" in found
    command = next(line for line in found.splitlines() if "--logdir" in line).partition("   (")[0]
    assert shlex.split(command)[1:] == ["--logdir", str(tmp_path / "a b" / "run")]


def test_without_validation_it_shows_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, val=False)
    assert "train accuracy" in found
    assert "val" not in found
    assert "--logdir" not in found


@pytest.mark.parametrize("arguments", [{"enable_progress_bar": False}, {"callbacks": [FitTable(show=False)]}])
def test_it_is_switched_off(capsys: pytest.CaptureFixture[str], arguments: dict[str, Any]) -> None:
    data = loader(batch())
    fit(small(), data, data, **({"enable_progress_bar": True} | arguments))
    assert "After" not in capsys.readouterr().out


def test_a_task_without_a_value_has_a_dash() -> None:
    report = FitReport(["a", "b"], {"loss_epoch/a": 1.0, "val/loss/a": 2.0, "val/loss/b": 3.0, "val/loss/total": 5.0})
    assert [[cell.text for cell in row] for row in report.shown().grid.rows] == [["a", "1", "2"], ["b", "–", "3"]]
    assert report.records() == (("task", "train loss", "val loss"), [("a", 1.0, 2.0), ("b", None, 3.0)])


def test_the_model_summary_has_a_row_for_each_head_and_none_for_metrics() -> None:
    module = binary()
    assert TaskSummary(module).layer_names == ["trunk", "heads/a", "heads/b"]
    assert TaskSummary(module).param_nums == [36, 5, 5]
    deep = TaskSummary(module, max_depth=-1).layer_names
    assert [name for name in deep if name.startswith("heads")] == [
        "heads",
        *(f"heads.{task}{rest}" for task in "ab" for rest in ("", ".0", ".1")),
    ]
    assert not any("metrics" in name for name in deep)
    plain = nn.ModuleDict({"heads": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    assert TaskSummary(_Plain(plain)).layer_names == ["inside"]


def test_metrics_with_parameters_stay_in_the_summary() -> None:
    class WithNet(R2Score):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    module = small()
    module.val_task_metrics = nn.ModuleDict({"a": WithNet()})
    assert TaskSummary(module).layer_names == ["trunk", "heads/a", "heads/b", "val_task_metrics"]


class _Plain(pl.LightningModule):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside


@pytest.mark.parametrize("cls", [ModelSummary, RichModelSummary])
def test_trainers_print_it_with_their_own_depth(
    cls: type[ModelSummary], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.callbacks.model_summary")
    for depth in (1, 2):
        fit(small(), loader(batch()), enable_model_summary=True, callbacks=[cls(max_depth=depth)])
        found = capsys.readouterr().out + caplog.text
        caplog.clear()
        assert ("heads/a" in found) == (depth == 1)
        assert ("heads.a" in found) == (depth == 2)


def test_baselines_show_one_display(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def trainer() -> pl.Trainer:
        return quiet_trainer(enable_progress_bar=True, enable_model_summary=True)

    data = loader(batch())
    single_task_baselines(binary(), (data, data), trainer, seeds=(3, 4))
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("single_task_baselines")]
    wanted = [(3, "a"), (3, "b"), (4, "a"), (4, "b")]
    assert lines == [
        f"single_task_baselines {place}/4: seed {seed}, task {task}" for place, (seed, task) in enumerate(wanted, 1)
    ]
    assert not shown.out
    assert "stopped" not in caplog.text
    single_task_baselines(binary(), (data, data), quiet_trainer, progress=False)
    assert not capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("tune", 0, done=2) as progress:
        progress.total = 4
        progress.begin("trial 2, seed 0")
    assert "2/4" in terminal.getvalue()
    assert "trial 2, seed 0" in terminal.getvalue()


def test_what_every_fit_of_many_would_warn_of_is_left_out() -> None:
    inputs, targets = batch()
    data = loader((inputs, {"a": targets["a"], "b": targets["b"] + 1e4}))

    def heard(silence: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with silence:
                fit(small(), data, logger=Memory())
                warnings.warn("something else", stacklevel=1)
        return [str(one.message) for one in seen if "torch" not in str(one.message)]

    loud = " ".join(heard(nullcontext()))
    assert "smaller than the logging interval" in loud
    assert "In the first step the loss of task 'b'" in loud
    assert heard(quiet())[-1] == "something else"
    assert not re.search("logging interval|In the first step", " ".join(heard(quiet())))
