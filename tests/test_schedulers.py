"""Learning-rate schedulers in manual optimization against Lightning's automatic loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_mtl import MultiTaskModule, Task
from tests.automatic import WEIGHTS, Automatic, Configure, Manual, Run, assert_same_history, batches, sgd
from tests.thinning import thinned
from tests.training import History, fit, loader


def step_lr(optimizer: Optimizer) -> Any:
    return schedulers.StepLR(optimizer, step_size=1, gamma=0.7)


def one_cycle(optimizer: Optimizer) -> Any:
    return schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def warmup(optimizer: Optimizer) -> Any:
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 6))


def plateau(optimizer: Optimizer) -> Any:
    # Every value that is not a third below the best lowers the rate.
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.33)


def with_scheduler(make: Callable[[Optimizer], Any], **config: Any) -> Configure:
    def configure(parameters: Iterable[Any]) -> Any:
        optimizer = sgd(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return configure


def changed(history: History) -> bool:
    return len({tuple(rates) for rates in history.rates}) > 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("frequency", thinned([3, 1, 2], 3))
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_interval_and_frequency(interval: str, frequency: int, accumulate: int) -> None:
    configure = with_scheduler(step_lr, interval=interval, frequency=frequency)
    run = Run(configure, accumulate=accumulate, epochs=3, batches=6 if accumulate == 1 else 7)
    _, manual = assert_same_history(run)
    assert changed(manual)


@pytest.mark.parametrize("make", [one_cycle, warmup])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedulers_of_steps(make: Callable[[Optimizer], Any], accumulate: int) -> None:
    _, manual = assert_same_history(Run(with_scheduler(make, interval="step"), accumulate=accumulate, epochs=2))
    assert changed(manual)


def test_several_schedulers_of_one_optimizer() -> None:
    def configure(parameters: Iterable[Any]) -> Any:
        optimizer = sgd(parameters)
        return [optimizer], [
            {"scheduler": warmup(optimizer), "interval": "step"},
            {"scheduler": plateau(optimizer), "monitor": "val/loss/a"},
        ]

    _, manual = assert_same_history(Run(configure, epochs=4, val=True))
    assert changed(manual)


def test_parameter_groups_keep_their_rates() -> None:
    def configure(parameters: Iterable[Any]) -> Any:
        found: list[Any] = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": found[:2], "name": "trunk"},
            {"params": found[2:], "name": "rest", "lr": 0.01},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return [optimizer], [step_lr(optimizer)]

    _, manual = assert_same_history(Run(configure, epochs=3))
    assert len(manual.rates[0]) == 2
    assert changed(manual)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("monitor", ["val/loss/a", "loss_epoch/a"])
def test_plateau_each_epoch(monitor: str, frequency: int) -> None:
    configure = with_scheduler(plateau, monitor=monitor, frequency=frequency)
    _, manual = assert_same_history(Run(configure, epochs=6, val=True))
    assert changed(manual)


def test_plateau_with_several_validations_an_epoch() -> None:
    configure = with_scheduler(plateau, monitor="val/loss/b")
    _, manual = assert_same_history(Run(configure, epochs=4, batches=6, val=True, trainer={"val_check_interval": 2}))
    assert changed(manual)


# With accumulation, our loss/a is the mean over a window, theirs the last micro-batch's.
@pytest.mark.parametrize(("monitor", "accumulate"), [("val/loss/a", 1), ("val/loss/a", 2), ("loss/a", 1)])
@pytest.mark.parametrize("frequency", thinned([3, 1, 2], 3))
def test_plateau_each_few_steps(monitor: str, frequency: int, accumulate: int) -> None:
    configure = with_scheduler(plateau, monitor=monitor, interval="step", frequency=frequency, strict=False)
    # A validation after every batch, so that there is a new value before every step of the scheduler.
    run = Run(configure, epochs=2, batches=6, accumulate=accumulate, val=True, trainer={"val_check_interval": 1})
    _, manual = assert_same_history(run)
    assert changed(manual)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_missing_metric_is_an_error_or_a_warning(interval: str) -> None:
    strict = with_scheduler(plateau, monitor="nowhere", interval=interval)
    with pytest.raises(MisconfigurationException, match=r"'nowhere', which has not been logged; there are \["):
        assert_missing(strict)
    lenient = with_scheduler(plateau, monitor="nowhere", interval=interval, strict=False)
    with pytest.warns(UserWarning, match="'nowhere', which has not been logged; skipped"):
        assert_missing(lenient)


def assert_missing(configure: Configure) -> None:
    module = manual()
    module.configure = configure
    fit(module, loader(*batches(2)))


def manual(cls: type[Manual] = Manual, **arguments: Any) -> Manual:
    return cls(
        nn.Linear(3, 4),
        {task: nn.Linear(4, 1) for task in WEIGHTS},
        {task: Task(mse_loss) for task in WEIGHTS},
        **arguments,
    ).double()


def test_a_metric_logged_by_the_module_itself_at_the_epochs_end() -> None:
    class LoggingAutomatic(Automatic):
        def on_train_epoch_end(self) -> None:
            self.log("mine", float(self.current_epoch % 2))

    class LoggingManual(Manual):
        def on_train_epoch_end(self) -> None:
            self.log("mine", float(self.current_epoch % 2))

    configure, histories = with_scheduler(plateau, monitor="mine"), (History(), History())
    parts = nn.Linear(3, 4).double(), nn.ModuleDict({task: nn.Linear(4, 1).double() for task in WEIGHTS})
    theirs = fit(LoggingAutomatic(*parts, configure), loader(*batches(2)), max_epochs=4, callbacks=[histories[0]])
    heads: Any = parts[1]
    ours = LoggingManual(parts[0], heads, {task: Task(mse_loss) for task in WEIGHTS})
    ours.configure = configure
    trainer = fit(ours, loader(*batches(2)), max_epochs=4, callbacks=[histories[1]])
    # The last step of all comes after the history's last look.
    assert histories[0].rates[:-1] == histories[1].rates[:-1]
    assert trainer.optimizers[0].param_groups[0]["lr"] == theirs.optimizers[0].param_groups[0]["lr"]
    assert changed(histories[1])


def test_lr_scheduler_step_may_be_overridden() -> None:
    class Halving(Manual):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            for group in scheduler.optimizer.param_groups:
                group["lr"] /= 2

    module, history = manual(), History()
    module.__class__ = Halving
    module.configure = with_scheduler(step_lr, interval="step")
    fit(module, loader(*batches(3)), callbacks=[history])
    assert [rates[0] for rates in history.rates] == [0.025, 0.0125, 0.00625, 0.00625]


def test_schedulers_given_as_arguments() -> None:
    def plain(**arguments: Any) -> MultiTaskModule:
        heads = {task: nn.Linear(4, 1) for task in WEIGHTS}
        tasks = {task: Task(mse_loss) for task in WEIGHTS}
        return MultiTaskModule(nn.Linear(3, 4), heads, tasks, optimizer=sgd, **arguments).double()

    epochs, plateaus = History(), History()
    fit(plain(lr_scheduler=step_lr), loader(*batches(1)), max_epochs=3, callbacks=[epochs])
    assert [rates[0] for rates in epochs.rates] == pytest.approx([0.035, 0.0245, 0.01715, 0.01715])

    def monitoring(optimizer: Optimizer) -> Any:
        return MonitoringPlateau(optimizer, monitor="loss_epoch/a", factor=0.5, patience=0, threshold=1e9)

    fit(plain(lr_scheduler=monitoring), loader(*batches(1)), max_epochs=3, callbacks=[plateaus])
    assert plateaus.rates[0] == [0.05]
    assert plateaus.rates[-1][0] < 0.05


def test_configure_optimizers_by_hand_returns_what_the_user_wrote() -> None:
    module = manual()
    module.configure = with_scheduler(step_lr, interval="step", frequency=5)
    assert module.configure_optimizers()["lr_scheduler"]["frequency"] == 5


def test_a_resumed_scheduler_goes_on(tmp_path: Any) -> None:
    def run(ckpt: Any = None, **arguments: Any) -> tuple[pl.Trainer, History]:
        torch.manual_seed(3)
        module, history = manual(), History()
        module.configure = with_scheduler(plateau, monitor="val/loss/a")
        data = loader(*batches(3)), loader(*batches(2, seed=8))
        return fit(module, *data, ckpt_path=ckpt, callbacks=[history], **arguments), history

    _, whole = run(max_epochs=4)
    trainer, _ = run(max_epochs=2)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    _, rest = run(tmp_path / "middle.ckpt", max_epochs=4)
    assert rest.rates == whole.rates[6:]
    assert changed(rest)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_scheduler_that_is_due_when_a_checkpoint_is_saved_is_stepped_by_who_resumes(tmp_path: Any) -> None:
    class LogsAtTheEnd(Manual):
        def on_train_epoch_end(self) -> None:
            self.log("mine", float(self.current_epoch % 2))

    def run(ckpt: Any = None) -> History:
        torch.manual_seed(3)
        module, history = manual(LogsAtTheEnd), History()
        module.configure = with_scheduler(plateau, monitor="mine")
        # Saved at the end of an epoch, where the scheduler still waits for what the module logs there.
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callbacks = [history, saving]
        data = loader(*batches(2))
        fit(module, data, ckpt_path=ckpt, callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
        return history

    whole, rest = run(), run(tmp_path / "epoch=1.ckpt")
    assert whole.rates[4] < whole.rates[3]
    assert rest.rates == whole.rates[4:]
