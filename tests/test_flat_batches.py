"""Flat batches, inputs and targets in one dict: the same numbers in every stage as the same samples in pairs."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, StackDataset
from torchmetrics import MeanAbsoluteError
from transformers import BatchEncoding

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.transfer import only_tasks
from lightning_mtl.weighting import MGDA
from tests.training import Batches, fit, loader, quiet_trainer

TARGETS = {"a": "labels"}
Flat = dict[str, Any]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.linear(ids * mask).tanh()  # type: ignore[no-any-return]


def model(cls: type[MultiTaskModule] = MultiTaskModule, **arguments: Any) -> MultiTaskModule:
    torch.manual_seed(1)
    heads = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    tasks = {
        "a": Task(mse_loss, metrics={"error in points": MeanAbsoluteError()}),
        "b": Task(mse_loss, standardize=arguments.pop("standardize", False)),
    }
    return cls(Sum(), heads, tasks, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **arguments)


def flat(seed: int, **others: Any) -> Flat:
    drawn = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(5, 3, generator=drawn) for name in ("ids", "mask")}
    return {**values, **{name: torch.randn(5, 1, generator=drawn) for name in ("labels", "b")}, **others}


def paired(batch: Flat) -> Any:
    return {k: batch[k] for k in ("ids", "mask")}, {"a": batch["labels"], "b": batch["b"]}


FLAT, EVAL = [flat(seed, text=["x"] * 5) for seed in range(3)], [flat(9, text=["y"] * 5)]


def logged(module: MultiTaskModule, trainer: pl.Trainer, test: Any) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, test, verbose=False)
    found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found | {name: float(p.detach().sum()) for name, p in module.named_parameters()}


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("wrap", [dict, BatchEncoding])
def test_every_stage_reads_them_as_it_reads_pairs(wrap: Any, standardize: bool) -> None:
    found = []
    for how in ("flat", "pairs"):
        arguments: dict[str, Any] = {"inputs": ["ids", "mask"], "targets": TARGETS} if how == "flat" else {}
        made: Any = wrap if how == "flat" else paired
        module = model(standardize=standardize, **arguments)
        train, val = loader(*map(made, FLAT)), loader(*map(made, EVAL))
        trainer = fit(module, train, val, callbacks=[MGDA()])
        numbers = logged(module, trainer, val)
        (prediction,) = trainer.predict(module, val)  # type: ignore[misc]
        found.append((numbers, cast("dict[str, Any]", prediction)))
    assert found[0][0] == found[1][0]
    assert "val/error in points/a" in found[0][0]
    for task in "ab":
        torch.testing.assert_close(found[0][1][task], found[1][1][task])


def test_keys_that_are_no_targets_are_the_inputs_by_default_and_a_single_one_goes_by_position() -> None:
    batch = flat(0)
    module = model(targets=TARGETS)
    wanted = model().task_outputs(model()(paired(batch)[0]), paired(batch)[1])
    found = module.present_outputs(batch)
    assert [found[task].loss.item() for task in "ab"] == [wanted[task].loss.item() for task in "ab"]
    single = MultiTaskModule(
        nn.Sequential(nn.Linear(3, 4)), {"a": nn.Linear(4, 1)}, {"a": Task(mse_loss)}, inputs="ids"
    )
    assert single.task_losses({"ids": batch["ids"], "a": batch["b"]}).keys() == {"a"}


def test_a_task_without_its_key_is_absent_and_predictions_need_no_targets() -> None:
    module = model(inputs=["ids", "mask"], targets=TARGETS)
    batch = flat(0)
    del batch["labels"]
    assert module.task_losses(batch).keys() == {"b"}
    del batch["b"]
    assert module.predict_step(batch, 0).keys() == {"a", "b"}
    with pytest.raises(ValueError, match=r"has the keys \['ids', 'mask'\].* under \{'a': 'labels', 'b': 'b'\}"):
        module.task_losses(batch)
    with pytest.raises(ValueError, match=r"names \['mask'\], but the batch has the keys \['ids', 'labels'\]"):
        module.task_losses({"ids": batch["ids"], "labels": flat(0)["labels"]})


def test_a_dataset_for_each_task_in_every_stage() -> None:
    def sets(seed: int) -> dict[str, Any]:
        found = {}
        for place, task in enumerate("ab"):
            batch = flat(seed + place)
            found[task] = StackDataset(ids=batch["ids"], mask=batch["mask"], labels=batch["labels"])
        return found

    def pairs(seed: int) -> dict[str, Any]:
        def of(data: Any) -> Any:
            return Batches([({"ids": x["ids"], "mask": x["mask"]}, x["labels"]) for x in data])

        return {task: of(data) for task, data in sets(seed).items()}

    found = []
    cases: list[tuple[Any, dict[str, Any]]] = [
        (sets, {"inputs": ["ids", "mask"], "targets": {"a": "labels", "b": "labels"}}),
        (pairs, {}),
    ]
    for made, arguments in cases:
        module = model(**arguments)
        data = MultiTaskDataModule(train=made(0), val=made(5), test=made(6), predict=made(7), batch_size=2)
        trainer = quiet_trainer()
        trainer.fit(module, datamodule=data)
        predicted = trainer.predict(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        found.append(({k: float(v) for k, v in trainer.callback_metrics.items()}, predicted))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_named_validation_loaders_and_tasks_alone() -> None:
    module = only_tasks(model(inputs=["ids", "mask"], targets={"a": "labels", "b": "b"}), ["a"])
    trainer = fit(module, loader(*FLAT), {"a": loader(*EVAL), "b": loader(*EVAL)})
    assert {"val/loss/a"} == {
        name for name in trainer.callback_metrics if name.startswith("val/loss/") and "tot" not in name
    }


def test_an_override_gets_the_batch_as_the_loader_made_it() -> None:
    class Own(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            assert "text" in batch
            return super().task_losses(batch)

    fit(model(Own, inputs=["ids", "mask"], targets=TARGETS), loader(*FLAT), loader(*EVAL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": {"c": "x"}}, r"targets names \['c'\], but the tasks are \['a', 'b'\]"),
        ({"inputs": ["labels"], "targets": TARGETS}, r"inputs names \['labels'\], which are targets"),
        ({"targets": ["labels"]}, "targets must be {task: key of the batch}, found list"),
        ({"inputs": [1]}, "name keys of the batch by their names, found 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def test_a_loader_of_dicts_collates() -> None:
    data = StackDataset(**flat(0))
    fit(model(targets=TARGETS), DataLoader(data, batch_size=2))
