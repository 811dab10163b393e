"""Metrics in every form, those that compute dicts included, and baselines for what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.transfer.runs import metric_directions
from lightning_mtl.tuning.goals import Goal
from tests.small import batch, heads, small, trunk
from tests.training import Steps, fit, loader, quiet_trainer


class Precision(Metric):
    """Computes what a detection metric does: numbers, indices of classes, and a number for each class."""

    higher_is_better: bool | None = True
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.total += (prediction - target).abs().sum()

    def compute(self) -> dict[str, Any]:
        mean = self.total / 4
        classes = {"classes": torch.tensor([3, 5], dtype=torch.int32), "per_class": torch.stack([mean, mean])}
        return {"map": mean, "map_50": 2 * mean, "images": 4, **classes}


class Unannotated(Precision):
    def compute(self):  # type: ignore[no-untyped-def]
        return super().compute()


class Error(Precision):
    higher_is_better = False


def module_of(task: Task) -> MultiTaskModule:
    torch.manual_seed(2)
    return MultiTaskModule(trunk(), heads(), {"a": task, "b": Task(mse_loss)})


@pytest.mark.parametrize("form", ["metric", "collection", "list", "dict", "list of collections"])
def test_every_form_of_metrics(form: str) -> None:
    given: dict[str, Any] = {
        "metric": MeanAbsoluteError(),
        "collection": MetricCollection([MeanAbsoluteError(), MeanSquaredError()]),
        "list": [MeanAbsoluteError(), MeanSquaredError()],
        "dict": {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()},
        "list of collections": [MetricCollection({"mae": MeanAbsoluteError()})],
    }
    names = {"metric": {"MeanAbsoluteError"}, "dict": {"mae", "mse"}, "list of collections": {"mae"}}
    task = Task(mse_loss, given[form])
    assert set(task.metric_collection()) == names.get(form, {"MeanAbsoluteError", "MeanSquaredError"})
    trainer = fit(module_of(task), loader(batch()), loader(batch()))
    assert {f"val/{name}/a" for name in task.metric_collection()} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("metric", [Precision, Unannotated])
def test_numbers_of_a_dict_are_logged_by_their_keys(metric: type[Metric]) -> None:
    module = module_of(Task(mse_loss, metric(), {"map_50": 0.5, "loss": 1.0}))
    with pytest.warns(UserWarning, match="of task 'a' computes shape") as said:
        trainer = fit(module, loader(batch()), loader(batch()), max_epochs=2)
    texts = [str(warning.message) for warning in said]
    assert sorted(text.split("'")[1] for text in texts if "computes shape" in text) == ["classes", "per_class"]
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert found["val/map_50/a"] == pytest.approx(2 * found["val/map/a"])
    assert found["val/images/a"] == 4
    assert not any("class" in name for name in found)
    changes = [(0.5 - found["val/map_50/a"]) / 0.5, (found["val/loss/a"] - 1.0) / 1.0]
    assert found["val/delta_m"] == pytest.approx(50 * sum(changes), rel=1e-4)


def test_keys_that_two_metrics_share_begin_with_the_metrics_names() -> None:
    task = Task(mse_loss, {"one": Precision(), "two": Error()}, {"two_map": 0.5, "one_map": 0.5})
    assert (task.higher_is_better("one_map"), task.higher_is_better("two_map")) == (True, False)
    with pytest.warns(UserWarning, match="left out"):
        trainer = fit(module_of(task), loader(batch()), loader(batch()))
    assert {"val/one_map/a", "val/two_map_50/a", "val/delta_m"} <= set(trainer.callback_metrics)
    with pytest.raises(ValueError, match=r"'map' may be a key of any of .*some are better when higher"):
        task.higher_is_better("map")


@pytest.mark.parametrize("metrics", [MeanAbsoluteError(), [MeanAbsoluteError(), MeanSquaredError()], None])
def test_a_baseline_that_no_metric_can_compute_is_refused_at_once(metrics: Any) -> None:
    with pytest.raises(ValueError, match="names 'map', but the task's metrics are"):
        Task(mse_loss, metrics, {"map": 0.5})


@pytest.mark.parametrize("name", ["mapp", "per_class", "Precision"])
@pytest.mark.filterwarnings("ignore:.*which cannot be logged as one number")
def test_a_baseline_that_a_dict_lacks_is_refused_before_the_first_step(name: str) -> None:
    steps = Steps()
    says = f"of task 'a' names '{name}', but the numbers that its metrics compute are .*'map', 'map_50'"
    with pytest.raises(ValueError, match=says):
        fit(
            module_of(Task(mse_loss, Precision(), {name: 0.5})),
            loader(batch()),
            loader(batch()),
            num_sanity_val_steps=1,
            callbacks=[steps],
        )
    assert steps.signals == []


def test_keys_can_be_compared_and_searched_for() -> None:
    tasks = {"a": Task(mse_loss, Precision()), "b": Task(mse_loss, MeanAbsoluteError())}
    assert Goal(("val/map_50/a",), None).direction_for(tasks) == "maximize"
    assert metric_directions(tasks) == {"a": {"loss": False}, "b": {"MeanAbsoluteError": False}}
    assert metric_directions({"a": tasks["a"]}, ["map"]) == {"a": {"map": True}}


def test_a_key_that_is_logged_anyway_is_refused() -> None:
    class Losses(Precision):
        def compute(self) -> dict[str, Any]:
            return {"loss": torch.zeros(())}

    with pytest.raises(ValueError, match="of task 'a' computes 'loss'"):
        quiet_trainer().validate(module_of(Task(mse_loss, Losses())), loader(batch()), verbose=False)


# Errors


class FailingMetric(Precision):
    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def update(self, *_: Any) -> None:
        if self.at == "update":
            raise LookupError("mine")

    def compute(self) -> dict[str, Any]:
        raise LookupError("mine")


class FailingHead(torch.nn.Module):
    def forward(self, _: Tensor) -> Tensor:
        raise LookupError("mine")


def failing_loss(*_: Tensor) -> Tensor:
    raise LookupError("mine")


@pytest.mark.parametrize("part", ["loss", "head", "update", "compute"])
def test_errors_say_which_tasks_they_are(part: str) -> None:
    module = small()
    if part == "head":
        module.heads["b"] = FailingHead()
    else:
        metric = None if part == "loss" else FailingMetric(part)
        task = Task(failing_loss if part == "loss" else mse_loss, metric)
        module = MultiTaskModule(trunk(), heads(), {"a": Task(mse_loss), "b": task})
    with pytest.raises(LookupError, match="mine") as raised:
        quiet_trainer().validate(module, loader(batch()), verbose=False)
    where = part if part in ("loss", "head") else "metrics"
    said = [*map(str, raised.value.args), *getattr(raised.value, "__notes__", [])]  # Python 3.10 has no notes
    assert f"in the {where} of task 'b'" in " ".join(said)
    assert raised.traceback[-1].frame.code.raw.co_filename == __file__
