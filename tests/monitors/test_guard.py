"""A monitor that fails, or takes too long, ends itself and not the training."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mtl import Monitor, Signals
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity, Throughput, conflict, convergence, pairs
from lightning_mtl.monitors.course import table_of
from tests.small import batches, small
from tests.training import fit, flat_parameters, loader


class Fails(Monitor):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.calls = 0

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        self.calls += 1
        if self.calls == 2:
            raise self.error("on purpose")


def untouched() -> Tensor:
    module = small()
    fit(module, loader(*batches(4, 4, 4, 4)))
    return flat_parameters(module)


def test_it_warns_once_and_training_goes_on() -> None:
    module, failing, fine = small(), Fails(ValueError), GradientConflict(1, figure=False)
    with pytest.warns(UserWarning, match="Fails is turned off, training goes on: ValueError: on purpose") as caught:
        fit(module, loader(*batches(4, 4, 4, 4)), callbacks=[failing, fine])
    assert sum("turned off" in str(warning.message) for warning in caught) == 1
    assert (failing.calls, failing.off, fine.off) == (2, True, False)
    assert float(fine.whole.sums[1][0, 1]) == 4
    assert torch.equal(flat_parameters(module), untouched())


def test_it_begins_anew_in_the_next_fit() -> None:
    failing = Fails(ValueError)
    for calls, module in ((2, small()), (6, small())):
        if calls == 2:
            with pytest.warns(UserWarning, match="turned off"):
                fit(module, loader(*batches(4, 4, 4, 4)), callbacks=[failing])
        else:
            fit(module, loader(*batches(4, 4, 4, 4)), callbacks=[failing])
        assert failing.calls == calls


def test_an_interruption_is_no_failure() -> None:
    with pytest.raises(SystemExit):
        fit(small(), loader(*batches(4, 4)), callbacks=[Fails(SystemExit)])


def test_what_cannot_be_measured_is_given_up() -> None:
    class Recomputed(nn.Module):
        """Autograd does not see the parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.layer, inputs.requires_grad_(), use_reentrant=True)
            return found

    module = small()
    module.trunk = Recomputed()
    monitors: list[Monitor] = [GradientConflict(1, figure=False), TaskAffinity(1, exact=True, lr=0.1, figure=False)]
    with pytest.warns(
        UserWarning, match=r"is turned off, training goes on: ValueError: no task's loss depends on .*trunk"
    ) as caught:
        trainer = fit(module, loader(*batches(4, 4, 4)), callbacks=monitors)
    assert sum("turned off" in str(warning.message) for warning in caught) == 2
    assert trainer.global_step == 3
    assert all(m.off for m in monitors)


def test_a_slow_one_is_judged_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    class Slow(Monitor):
        calls = 0

        def observe(self, *_: Any) -> None:
            nonlocal now
            self.calls += 1
            now += 20.0

    monkeypatch.setattr(time, "perf_counter", clock)
    slow, allowed = Slow(), Slow()
    allowed.most_time = 1.0
    with pytest.warns(UserWarning, match="Slow is turned off, .* it took 100 % of the time; raise every_n_steps=1"):
        fit(small(), loader(*batches(4, 4, 4, 4)), callbacks=[slow])
    assert slow.calls == 2
    fit(small(), loader(*batches(4, 4, 4, 4)), callbacks=[allowed])
    assert allowed.calls == 4


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("where", ["observe", "figure", "validation", "report", "clock"])
def test_no_hook_of_ours_stops_a_training(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    throughput = Throughput(1)
    watching: dict[str, Monitor] = {
        "observe": GradientConflict(1, figure=False),
        "figure": GradientConflict(1),
        "validation": Convergence(1),
        "report": Convergence(1),
        "clock": throughput,
    }
    monkeypatch.setattr(conflict, "conflict_measures", broken if where == "observe" else conflict.conflict_measures)
    monkeypatch.setattr(pairs, "heatmap", broken)
    monkeypatch.setattr(convergence, "_note", broken if where == "validation" else convergence._note)
    monkeypatch.setattr(convergence, "table_of", broken if where == "report" else table_of)
    monkeypatch.setattr(throughput, "_log", broken)
    data = batches(4, 4, 4, 4)
    module = small()
    logger = pl.loggers.TensorBoardLogger(str(tmp_path))
    with pytest.warns(UserWarning, match="is turned off, training goes on: RuntimeError: on purpose"):
        fit(module, loader(*data), loader(*data), callbacks=[watching[where]], logger=logger)
    assert torch.equal(flat_parameters(module), untouched())
    assert not module.optimization.phases.listening
