"""Tasks added to a trained model and dropped from one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CyclicLR

from lightning_mtl import Task, Weighting
from lightning_mtl.architectures import MMoE
from lightning_mtl.finetuning import add_task, drop_task
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.weighting import DWA, MGDA, UncertaintyWeighting
from tests.contract import habits, one_of_each
from tests.contract_rows import METHODS
from tests.small import TASKS, batch, binary, heads, regressions, small
from tests.training import Memory, Steps, fit, loader, quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=0.05)
ALL = ("a", "b", "c")
STATEFUL = [make for make in METHODS.values() if make()._states]


def grow(module: MultiTaskModule) -> MultiTaskModule:
    torch.manual_seed(3)
    metrics = binary().tasks["a"].metrics
    add_task(module, "c", nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), Task(mse_loss, metrics))
    return module


@pytest.mark.parametrize("make", one_of_each(STATEFUL, habits))
def test_any_weighting_goes_on_with_a_task_more_and_one_less(make: Callable[[], Weighting]) -> None:
    module, weighting, logger = binary(optimizer=ADAM), make(), Memory()
    data, more = loader(batch(8)), loader(batch(8, tasks=ALL))
    fit(module, data, data, callbacks=[weighting])
    grow(module)
    fit(module, more, more, callbacks=[weighting], logger=logger, log_every_n_steps=1)
    assert weighting.tasks == ALL
    names = {name for _, line in logger.lines for name in line}
    assert {"loss/c", "val/loss/c", "val/accuracy/c"} <= names
    drop_task(module, "a")
    fit(module, more, more, callbacks=[weighting])
    assert list(weighting.tasks) == ["b", "c"]


def test_a_grown_model_trains_like_one_built_with_all_tasks() -> None:
    built = binary(tasks=ALL, optimizer=ADAM)
    grown = binary(optimizer=ADAM)
    grow(grown)
    grown.load_state_dict(built.state_dict())
    ends = []
    for module in (built, grown):
        steps = Steps()
        fit(module, loader(batch(8, tasks=ALL), batch(8, 6, ALL)), max_epochs=2, callbacks=[MGDA(), steps])
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_one_trainer_over_a_change_of_tasks() -> None:
    module, weighting = binary(optimizer=ADAM), DWA()
    trainer = quiet_trainer(max_epochs=1, callbacks=[weighting])
    trainer.fit(module, loader(batch(8)))
    grow(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batch(8, tasks=ALL)), loader(batch(8, tasks=ALL)))
    assert weighting.tasks == ALL
    assert "val/loss/c" in trainer.callback_metrics


def test_checkpoints_before_and_after(tmp_path: Path) -> None:
    module = binary(optimizer=ADAM)
    fit(module, loader(batch(8)), callbacks=[UncertaintyWeighting()]).save_checkpoint(tmp_path / "two.ckpt")
    again = binary(optimizer=ADAM)
    again.load_state_dict(torch.load(tmp_path / "two.ckpt")["state_dict"])
    grow(again)
    assert torch.equal(again.trunk[0].weight, module.trunk[0].weight)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(again, loader(batch(8, tasks=ALL)), ckpt_path=tmp_path / "two.ckpt", max_epochs=2)
    trainer = fit(again, loader(batch(8, tasks=ALL)), callbacks=[UncertaintyWeighting()])
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed = grow(binary(optimizer=ADAM))
    weighting = UncertaintyWeighting()
    fit(resumed, loader(batch(8, tasks=ALL)), ckpt_path=tmp_path / "three.ckpt", max_epochs=2, callbacks=[weighting])
    assert weighting.tasks == ALL


def test_dropping_gives_back_what_adding_took() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return mse_loss(prediction, target)

    module = small()
    before = set(module.state_dict())
    head, task = nn.Linear(4, 1), Task(Loss())
    add_task(module, "c", head, task)
    assert {"heads.c.weight", "loss_modules.c.scale"} <= set(module.state_dict())
    module.learned_tasks = frozenset({"a", "c"})
    assert drop_task(module, "c") == (head, task)
    assert set(module.state_dict()) == before
    assert module.learned_tasks == {"a"}


def test_a_dropped_task_takes_its_learning_rate_along() -> None:
    module = small(trunk_lr=0.5, head_lr={"a": 0.1, "b": 0.2})
    drop_task(module, "a")
    groups = fit(module, loader(batch())).optimizers[0].param_groups
    assert {group["name"]: group["lr"] for group in groups} == {"trunk": 0.5, "head/b": 0.2}
    alone = small(head_lr={"a": 0.1}, lr_scheduler=lambda optimizer: CyclicLR(optimizer, 0.1, 0.2))
    drop_task(alone, "a")
    fit(alone, loader(batch()))  # no part has a rate of its own any more


def test_what_is_refused() -> None:
    module, task = small(), Task(mse_loss)
    with pytest.raises(ValueError, match="has a task 'a' already"):
        add_task(module, "a", nn.Linear(4, 1), task)
    with pytest.raises(ValueError, match="cannot name a task"):
        add_task(module, "c.d", nn.Linear(4, 1), task)
    with pytest.raises(TypeError, match=r"heads\['c'\] must be a Module"):
        add_task(module, "c", "head", task)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tasks\['c'\] must be a Task"):
        add_task(module, "c", nn.Linear(4, 1), mse_loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task 'c'"):
        drop_task(module, "c")
    drop_task(module, "a")
    with pytest.raises(ValueError, match="only task"):
        drop_task(module, "b")
    assert list(module.tasks) == list(module.heads) == ["b"]
    experts = MultiTaskModule(MMoE([nn.Linear(3, 4), nn.Linear(3, 4)], TASKS, 3), heads(), regressions())
    with pytest.raises(ValueError, match=r"MMoE, has an output for each task.*load_trunk"):
        add_task(experts, "c", nn.Linear(4, 1), task)
    with pytest.raises(ValueError, match="would keep that of 'a'"):
        drop_task(experts, "a")


def test_not_in_the_middle_of_a_fit() -> None:
    class Adding(Callback):
        def on_train_batch_end(self, trainer: object, pl_module: object, *_: object) -> None:
            assert isinstance(pl_module, MultiTaskModule)
            add_task(pl_module, "c", nn.Linear(4, 1), Task(mse_loss))

    with pytest.raises(RuntimeError, match="while a Trainer runs the module"):
        fit(small(), loader(batch(8)), callbacks=[Adding()])
