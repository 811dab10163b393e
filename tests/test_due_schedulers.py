"""Schedulers that are due after a batch without a step, against Lightning's automatic loop."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mtl import Task
from lightning_mtl.weighting import StaticWeights
from tests.automatic import WEIGHTS, Automatic, Manual, batches
from tests.test_schedulers import changed, manual, plateau, step_lr, with_scheduler
from tests.thinning import thinned
from tests.training import History, fit, flat_parameters, loader


class StepsTaken(History):
    """Keeps the rates of every step, and the parameters after every batch."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.parameters.append(flat_parameters(pl_module))


ENDING = {
    "None at the end": [0, 1, 2, None],
    "None twice": [0, 1, None, None],
    "None within": [0, 1, 2, None, 3, 4],
    "None cuts a window": [0, None, 1, 2, 3, None],
    "an epoch that its hook ends": [0, 1, 2, -1, 3],
}


def leaving_out(cls: type, kinds: list[Any]) -> type:
    """A subclass whose hook ends the epoch before the batch of kind -1."""

    class LeavingOut(cls):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if kinds[batch_idx] == -1 else None

    return LeavingOut


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None", "ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kinds", thinned([pytest.param(kinds, id=name) for name, kinds in ENDING.items()], 2))
@pytest.mark.parametrize(
    "config",
    [
        {"interval": "epoch"},
        {"interval": "epoch", "frequency": 2},
        {"interval": "step"},
        {"interval": "epoch", "monitor": "val/loss/a"},
        {"interval": "step", "monitor": "val/loss/a", "strict": False},
    ],
    ids=str,
)
def test_batches_without_a_step(config: dict[str, Any], kinds: list[Any], accumulate: int) -> None:
    given = [None if kind is None else batch for kind, batch in zip(kinds, batches(len(kinds)), strict=True)]
    data = loader(*given), loader(*batches(2, seed=8))
    configure = with_scheduler(plateau if "monitor" in config else step_lr, **config)
    torch.manual_seed(4)
    parts = nn.Linear(3, 4).double(), nn.ModuleDict({task: nn.Linear(4, 1).double() for task in WEIGHTS})
    own, histories = copy.deepcopy(parts), (StepsTaken(), StepsTaken())
    arguments: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 1}
    automatic = leaving_out(Automatic, kinds)(*parts, configure)
    theirs = fit(automatic, *data, callbacks=[histories[0]], accumulate_grad_batches=accumulate, **arguments)
    heads: Any = own[1]
    tasks = {task: Task(mse_loss) for task in WEIGHTS}
    ours = leaving_out(Manual, kinds)(own[0], heads, tasks, accumulate_grad_batches=accumulate)
    ours.configure = configure
    trainer = fit(ours, *data, callbacks=[histories[1], StaticWeights(WEIGHTS)], **arguments)
    torch.testing.assert_close(histories[1].rates, histories[0].rates, rtol=0, atol=1e-9)
    own_steps, their_steps = (torch.stack(history.parameters) for history in histories[::-1])
    torch.testing.assert_close(own_steps, their_steps, rtol=0, atol=1e-9)
    assert trainer.optimizers[0].param_groups[0]["lr"] == theirs.optimizers[0].param_groups[0]["lr"]
    assert changed(histories[1])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_the_module_does_without() -> None:
    class Without(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx < 2 else None

    module, history = manual(Without), StepsTaken()
    module.configure = with_scheduler(step_lr, interval="epoch")
    fit(module, loader(*batches(3)), callbacks=[history], max_epochs=2)
    assert [rates[0] for rates in history.rates] == pytest.approx([0.05, 0.05, 0.035, 0.035, 0.05 * 0.7**2])


@pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual optimization", "ignore:train_dataloader yielded None"
)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("kinds", [[0, 1, None], [0, 1, -1]], ids=str)
def test_a_checkpoint_has_the_schedulers_that_a_batch_without_a_step_leaves_over(kinds: Any, tmp_path: Any) -> None:
    def run(ckpt: Any = None) -> StepsTaken:
        module, history = manual(leaving_out(Manual, kinds)), StepsTaken()
        module.configure = with_scheduler(step_lr, interval="epoch")
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        data = loader(*[None if kind is None else one for kind, one in zip(kinds, batches(3), strict=True)])
        fit(module, data, ckpt_path=ckpt, callbacks=[history, saving], max_epochs=4, enable_checkpointing=True)
        return history

    whole, rest = run(), run(tmp_path / "epoch=1.ckpt")
    assert [rates[0] for rates in whole.rates[:-1:2]] == pytest.approx([0.05 * 0.7**epoch for epoch in range(4)])
    assert rest.rates == whole.rates[4:]
