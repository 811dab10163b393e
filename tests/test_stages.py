"""Metrics and mean losses of each stage, and the comparison with single-task scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import ConfusionMatrix, MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from lightning_mtl.training.scores import update_metrics
from tests.small import TASKS, Batch, batch, batches, binary, heads, small, trunk
from tests.training import fit, loader, quiet_trainer

SIZES = (4, 4, 3)


def direct(module: MultiTaskModule, given: list[Batch], task: str) -> dict[str, float]:
    """The figures of a task over all samples at once."""
    with torch.no_grad():
        prediction = torch.cat([module(inputs)[task] for inputs, _ in given])
    target = torch.cat([targets[task] for _, targets in given])
    accuracy, error = BinaryAccuracy(), MeanAbsoluteError()
    return {
        "accuracy": float(accuracy(prediction, target.int())),
        "error": float(error(prediction, target)),
        "loss": mse_loss(prediction, target).item(),
    }


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_equals_torchmetrics_on_all_samples(stage: str) -> None:
    module, given = binary(), batches(*SIZES)
    trainer = quiet_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    results = dict(evaluate(module, loader(*given), verbose=False)[0])
    total = 0.0
    for task in TASKS:
        expected = direct(module, given, task)
        total += expected["loss"]
        for name, value in expected.items():
            assert results.pop(f"{stage}/{name}/{task}") == pytest.approx(value, rel=1e-5)
    assert results.pop(f"{stage}/loss/total") == pytest.approx(total, rel=1e-5)
    assert results == {}


def test_training_metrics_and_mean_losses_cover_the_whole_epoch() -> None:
    module, given = binary(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), batches(*SIZES)
    trainer = fit(module, loader(*given))
    for task in TASKS:
        expected = direct(module, given, task)
        assert float(trainer.callback_metrics[f"loss_epoch/{task}"]) == pytest.approx(expected["loss"], rel=1e-5)
        for name in ("accuracy", "error"):
            found = float(trainer.callback_metrics[f"train/{name}/{task}"])
            assert found == pytest.approx(expected[name], rel=1e-5)


def test_every_epoch_and_validation_begins_anew() -> None:
    module = binary(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    given, val = batches(*SIZES), batches(3, 2, seed=30)
    trainer = fit(module, loader(*given), loader(*val), max_epochs=3, val_check_interval=1, num_sanity_val_steps=1)
    for task in TASKS:
        found = trainer.callback_metrics
        assert float(found[f"loss_epoch/{task}"]) == pytest.approx(direct(module, given, task)["loss"], rel=1e-5)
        assert float(found[f"val/loss/{task}"]) == pytest.approx(direct(module, val, task)["loss"], rel=1e-5)
        assert float(found[f"val/error/{task}"]) == pytest.approx(direct(module, val, task)["error"], rel=1e-5)


def test_the_sanity_check_leaves_no_trace() -> None:
    module, val = binary(), batches(4, 2, seed=30)
    trainer = fit(module, loader(*batches(4)), loader(*val), num_sanity_val_steps=1)
    expected = direct(module, val, "a")
    assert float(trainer.callback_metrics["val/accuracy/a"]) == pytest.approx(expected["accuracy"])
    assert float(trainer.callback_metrics["val/loss/a"]) == pytest.approx(expected["loss"])


class Counting(MultiTaskModule):
    """Says how many samples each loss is a mean over; hands no predictions to metrics."""

    counts: list[Any]

    def task_losses(self, batch: Any) -> dict[str, TaskOutput]:
        position, values = batch
        anchor = 0 * self.heads["a"](self.trunk(torch.zeros(1, 3))).sum()
        return {
            task: TaskOutput(anchor + value, num_samples=self.counts[position])
            for task, value in zip(TASKS, values, strict=True)
        }


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_samples_weigh_the_means(as_tensor: bool) -> None:
    module = small(cls=Counting)
    assert isinstance(module, Counting)
    module.counts = [torch.tensor(1), torch.tensor(3)] if as_tensor else [1, 3]
    trainer = fit(module, loader((0, (1.0, 10.0)), (1, (5.0, 30.0))), loader((0, (8.0, 0.0)), (1, (0.0, 0.0))))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["loss_epoch/a"] == pytest.approx(4.0)
    assert found["loss_epoch/b"] == pytest.approx(25.0)
    assert found["val/loss/a"] == pytest.approx(2.0)


def test_without_samples_every_batch_counts_the_same() -> None:
    module = small(cls=Counting)
    assert isinstance(module, Counting)
    module.counts = [None, None]
    trainer = fit(module, loader((0, (1.0, 10.0)), (1, (5.0, 30.0))))
    assert float(trainer.callback_metrics["loss_epoch/a"]) == pytest.approx(3.0)


def test_a_task_absent_all_along_has_no_figures() -> None:
    given = [(inputs, {"a": targets["a"]}) for inputs, targets in batches(4, 4)]
    trainer = fit(binary(), loader(*given), loader(*given))
    names = set(trainer.callback_metrics)
    assert {"loss_epoch/a", "val/loss/a", "val/accuracy/a", "val/loss/total"} <= names
    assert {name for name in names if name.endswith("/b")} == {"labeled/b"}
    assert trainer.callback_metrics["labeled/b"] == 0


@pytest.mark.parametrize("metrics", [None, "single", "collection"])
def test_metrics_are_named_by_their_collection_or_class(metrics: str | None) -> None:
    found: Any = {
        None: None,
        "single": MeanAbsoluteError(),
        "collection": MetricCollection({"mae": MeanAbsoluteError()}),
    }[metrics]
    module = MultiTaskModule(trunk(), heads(), {task: Task(mse_loss, found) for task in TASKS})
    trainer = fit(module, loader(batch()), loader(batch()))
    expected = {None: set(), "single": {"MeanAbsoluteError"}, "collection": {"mae"}}[metrics]
    names = {name.split("/")[1] for name in trainer.callback_metrics if name.startswith("val/")} - {"loss"}
    assert names == expected


def test_stages_and_tasks_do_not_share_metrics() -> None:
    shared = MeanAbsoluteError()
    module = MultiTaskModule(trunk(), heads(), {task: Task(mse_loss, shared) for task in TASKS})
    found = [
        m for stage in ("train", "val", "test") for ms in module.stage_metrics(stage).values() for m in ms.values()
    ]
    assert len({id(metric) for metric in [*found, shared]}) == 7


def test_metrics_see_what_an_output_says() -> None:
    class Doubling(MultiTaskModule):
        def task_losses(self, batch: Any) -> dict[str, TaskOutput]:
            inputs, targets = batch
            found = {task: (self(inputs)[task], targets[task]) for task in TASKS}
            return {
                "a": TaskOutput(mse_loss(*found["a"]), torch.ones(4, 1), torch.full((4, 1), 3.0)),
                "b": TaskOutput(mse_loss(*found["b"])),
            }

    module = Doubling(trunk(), heads(), {task: Task(mse_loss, MeanAbsoluteError()) for task in TASKS})
    trainer = fit(module, loader(batch()), loader(batch()))
    assert float(trainer.callback_metrics["val/MeanAbsoluteError/a"]) == pytest.approx(2.0)
    assert "val/MeanAbsoluteError/b" not in trainer.callback_metrics


def test_predictions_keep_no_graph_in_metrics() -> None:
    module = binary()
    update_metrics(module, "train", module.present_outputs(batch()))
    states = [s for ms in module.stage_metrics("train").values() for m in ms.values() for s in m.metric_state.values()]
    assert states
    assert not any(state.requires_grad for state in states if isinstance(state, Tensor))


def test_delta_m_compares_with_the_baselines() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 1)

    metrics = MetricCollection({"accuracy": BinaryAccuracy(), "error": MeanAbsoluteError()})
    tasks = {
        "a": Task(mse_loss, metrics, {"accuracy": 0.8, "error": 0.5}),
        "b": Task(mse_loss, metrics, {"loss": 0.2}),
        "c": Task(mse_loss, metrics),
    }
    module = MultiTaskModule(nn.Identity(), {task: Silent() for task in tasks}, tasks)
    # The prediction is 0: accuracy 3/4, error 1/4 for a; loss 1/2 for b.
    targets = {
        "a": torch.tensor([[0.0], [0.0], [0.0], [1.0]]),
        "b": torch.tensor([[0.0], [0.0], [1.0], [1.0]]),
        "c": torch.ones(4, 1),
    }
    results = quiet_trainer().test(module, loader((torch.zeros(4, 1), targets)), verbose=False)[0]
    changes = [(0.8 - 0.75) / 0.8, (0.25 - 0.5) / 0.5, (0.5 - 0.2) / 0.2]
    assert results["test/delta_m"] == pytest.approx(100 * sum(changes) / 3, rel=1e-5)


def test_no_delta_m_without_baselines_or_without_their_tasks() -> None:
    assert "val/delta_m" not in fit(binary(), loader(batch()), loader(batch())).callback_metrics
    tasks = {"a": Task(mse_loss), "b": Task(mse_loss, None, {"loss": 1.0})}
    module = MultiTaskModule(trunk(), heads(), tasks)
    inputs, targets = batch()
    trainer = fit(module, loader(batch()), loader((inputs, {"a": targets["a"]})))
    assert "val/loss/a" in trainer.callback_metrics
    assert "val/delta_m" not in trainer.callback_metrics


def test_a_metric_of_several_numbers_is_left_out_with_one_warning() -> None:
    tasks = {"a": Task(mse_loss, ConfusionMatrix(task="binary")), "b": Task(mse_loss)}
    module = MultiTaskModule(trunk(), {k: nn.Sequential(h, nn.Sigmoid()) for k, h in heads().items()}, tasks)
    inputs, targets = batch()
    given = (inputs, {"a": targets["a"], "b": targets["b"]})
    with pytest.warns(UserWarning, match=r"'BinaryConfusionMatrix' of task 'a' computes shape \[2, 2\]") as said:
        trainer = fit(module, loader(given), loader(given), max_epochs=3)
    assert len([warning for warning in said if "computes shape" in str(warning.message)]) == 1
    assert {name for name in trainer.callback_metrics if "ConfusionMatrix" in name} == set()
