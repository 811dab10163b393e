"""Losses over their scales, as if they had been divided by hand; and a look at the first losses of a fit."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import l1_loss, mse_loss

from lightning_mtl import Task
from lightning_mtl.weighting import MGDA, NashMTL, UncertaintyWeighting
from tests.test_units import WEIGHTINGS, callbacks, data, joint, model
from tests.training import fit, flat_parameters, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:In the first step the loss of task"),
    # Of resuming without the callback that saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.mark.parametrize("name", [*WEIGHTINGS, "accumulated", "automatic"])
@pytest.mark.parametrize("scale", [50.0, "initial"])
def test_a_scale_is_a_loss_divided_by_it(name: str, scale: Any) -> None:
    x, a, b = data()
    weighting = name if name in WEIGHTINGS else "trunk"
    size = 2 if name == "accumulated" else 1
    by_hand = scale if isinstance(scale, float) else mse_loss(model(Task(mse_loss))(x[:5])["b"], b[:5]).item()
    found = []
    for task in (Task(mse_loss, loss_scale=scale), Task(lambda p, y: mse_loss(p, y) / by_hand)):
        module = model(task, accumulate_grad_batches=size)
        module.automatic_optimization = name == "automatic"
        trainer = fit(module, joint(x, a, b), callbacks=callbacks(weighting), max_epochs=2, log_every_n_steps=1)
        found.append((flat_parameters(module), trainer.callback_metrics))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)
    logged, expected = found[0][1], found[1][1]
    torch.testing.assert_close(logged["loss/b"], expected["loss/b"] * by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(logged["weight/b"], expected["weight/b"] / by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(logged["loss/total"], expected["loss/total"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logged["loss_epoch/b"], expected["loss_epoch/b"] * by_hand, rtol=1e-4, atol=0)


def test_running_scales_follow_and_resume(tmp_path: Path) -> None:
    x, a, b = data()

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["loss/b"]))

    def train(**arguments: Any) -> tuple[Any, Any]:
        module = model(Task(mse_loss, loss_scale="running"))
        return module, fit(module, joint(x, a, b), max_epochs=2, log_every_n_steps=1, **arguments)

    seen: list[float] = []
    module, trainer = train(callbacks=[NashMTL(), Losses()])
    expected = seen[0]
    for loss in seen:
        expected = 0.99 * expected + 0.01 * loss
    assert float(module.recorder.scales.values[1]) == pytest.approx(expected, rel=1e-5)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    train(callbacks=[NashMTL(), saving], enable_checkpointing=True)
    resumed, again = train(callbacks=[NashMTL()], ckpt_path=next(tmp_path.glob("epoch=0*")))
    assert torch.equal(flat_parameters(module), flat_parameters(resumed))
    assert trainer.callback_metrics["weight/b"] == again.callback_metrics["weight/b"]


def test_a_task_that_comes_late_or_with_a_loss_of_0_takes_its_first_loss() -> None:
    x, a, b = data()
    perfect = model(Task(l1_loss))(x[5:10])["b"].detach()
    rows = [(x[:5], {"a": a[:5], "b": None}), (x[5:10], {"a": None, "b": perfect}), (x[:5], {"a": None, "b": b[:5]})]
    module = model(Task(l1_loss, loss_scale="initial"), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    trainer = fit(module, loader(*rows), log_every_n_steps=1)
    scale = l1_loss(module(x[:5])["b"], b[:5]).item()
    assert float(trainer.callback_metrics["weight/b"]) == pytest.approx(1 / scale, rel=1e-6)


def test_units_far_apart_are_warned_of_once() -> None:
    x, a, b = data()

    def warned(task: Task, *callbacks: Any) -> list[str]:
        module = model(task, optimizer=functools.partial(torch.optim.SGD, lr=1e-7))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, joint(x, a, b), callbacks=[*callbacks])
        return [str(one.message) for one in caught if "In the first step" in str(one.message)]

    [found] = warned(Task(mse_loss))
    assert "the loss of task 'b' is 8.1e+04 and that of task 'a' 0.76" in found
    assert not warned(Task(mse_loss, standardize=True))
    assert not warned(Task(mse_loss, loss_scale="initial"))
    assert not warned(Task(mse_loss, loss_scale="initial"), MGDA())
    assert len(warned(Task(mse_loss), UncertaintyWeighting())) == 1
