"""What cannot work is refused where it is said, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.learning_rates import Factor, GradientNorm, Importance, Relatedness, TaskLearningRate
from lightning_mtl.weighting import DWA, GradDrop, GradNorm
from tests.small import batch, binary, regressions, small, trunk
from tests.training import fit, loader

Make = Callable[[], object]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskLearningRate([]), r"factors=\[\]\) needs one"),
        (lambda: TaskLearningRate([Importance({}), DWA()]), "must hold factors, found DWA"),  # type: ignore[list-item]
        (lambda: TaskLearningRate([GradientNorm()] * 2), "holds the same object twice"),
        (lambda: TaskLearningRate(GradientNorm(), bounds=(2.0, 1.0)), r"bounds=\(2.0, 1.0\)"),
        (lambda: TaskLearningRate(GradientNorm(), bounds=(-1.0, 1.0)), r"bounds=\(-1.0, 1.0\)"),
        (lambda: TaskLearningRate(GradientNorm(), every_n_steps=0), r"every_n_steps=0\) must be at least 1"),
        (Importance, "takes one of the two"),
        (lambda: Importance({"a": 1.0}, metric="loss"), "takes one of the two"),
        (lambda: Importance({"a": -1.0}), "the factor -1.0"),
        (lambda: Importance(metric="loss", power=-1.0), r"power=-1.0\)"),
        (lambda: Importance(metric="loss", largest=0.5), r"largest=0.5\) must be at least 1"),
        (lambda: GradientNorm(power=float("nan")), r"power=nan\) must be between"),
        (lambda: GradientNorm(of="trunk"), r"of='trunk'\) must be 'head' or 'shared'"),  # type: ignore[arg-type]
        (lambda: GradientNorm(decay=1.0), r"decay=1.0\) must be at least 0 and below 1"),
        (lambda: Relatedness("cosine"), "must be one of"),  # type: ignore[arg-type]
        (lambda: Relatedness("gradient_cosine", power=-1), "power=-1"),
        (lambda: Relatedness("gradient_cosine", decay=2), "decay=2"),
        (lambda: Relatedness("target_correlation", samples=1), r"samples=1\) must be at least 2"),
    ],
)
def test_arguments(make: Make, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def with_accuracy(baselines: dict[str, float | None]) -> MultiTaskModule:
    metrics = MetricCollection({"accuracy": BinaryAccuracy()})
    tasks = {
        task: Task(nn.functional.mse_loss, metrics, None if value is None else {"accuracy": value})
        for task, value in baselines.items()
    }
    return MultiTaskModule(trunk(), {task: nn.Linear(4, 1) for task in tasks}, tasks)


@pytest.mark.parametrize(
    ("factor", "others", "module", "message"),
    [
        (Importance({"c": 1.0}), [], small, r"names \['c'\], but the tasks are \['a', 'b'\]"),
        (Importance(metric="accuracy"), [], small, r"not among the metrics of task 'a', \['loss'\]"),
        (Importance(metric="loss"), [], small, r"'loss'\) of task 'a' is no performance .*Task\(baseline="),
        (Importance(metric="error"), [], binary, "is no performance between 0 and 1"),
        (Importance(metric={"a": "accuracy"}), [], binary, r"names no metric for \['b'\]"),
        (Importance(metric="accuracy"), [], lambda: with_accuracy({"a": 0.5, "b": None}), r"which \['b'\] lack"),
        (Importance(metric="accuracy"), [], lambda: with_accuracy({"a": 0.5, "b": -1.0}), "divides by the baseline"),
        (Importance(metric="accuracy"), [], binary, "needs a validation loader"),
        (GradientNorm(of="shared"), [], small, "nothing measures without a weighting; .* use of='head'"),
        (GradientNorm(of="shared"), [DWA()], small, "nothing measures with DWA"),
        (Relatedness("gradient_cosine"), [GradNorm()], small, "nothing measures with GradNorm; .* MGDA"),
        (Relatedness("target_correlation"), [], lambda: small(["a"]), "the module has one"),
    ],
)
def test_factors_at_setup(factor: Factor, others: list[pl.Callback], module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(), loader(batch()), callbacks=[TaskLearningRate(factor), *others])


def test_a_factor_by_itself() -> None:
    with pytest.raises(TypeError, match=r"give the Trainer TaskLearningRate\(\[GradientNorm\(...\)\]\)"):
        fit(small(), loader(batch()), callbacks=[GradientNorm()])


def test_two_of_them() -> None:
    class Other(TaskLearningRate):
        pass  # Lightning itself refuses two of one class

    own = [TaskLearningRate(Importance({"a": 2.0})), Other(GradientNorm())]
    with pytest.raises(ValueError, match="holds 2 callbacks for tasks' learning rates"):
        fit(small(), loader(batch()), callbacks=own)


def test_another_module() -> None:
    with pytest.raises(TypeError, match="found BoringModel; subclass one of them"):
        fit(BoringModel(), None, callbacks=[TaskLearningRate(GradientNorm())])


def test_the_trunks_share_of_an_aggregator() -> None:
    own = TaskLearningRate(GradientNorm(), shares_trunk=True)
    with pytest.raises(ValueError, match=r"shares_trunk=True\) multiplies .* GradDrop has none"):
        fit(small(), loader(batch()), callbacks=[own, GradDrop()])


@pytest.mark.parametrize("automatic", [False, True])
def test_heads_without_groups_of_their_own(automatic: bool) -> None:
    class OneGroup(MultiTaskModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = small(cls=OneGroup)
    module.automatic_optimization = automatic
    with pytest.raises(ValueError, match=r"number 0 holds the head of 'a' together with that of 'b'.*parameter_groups"):
        fit(module, loader(batch()), callbacks=[TaskLearningRate(GradientNorm())])


def test_heads_without_parameters_of_their_own() -> None:
    decoder = nn.Linear(4, 1)
    own = {"a": nn.Sequential(decoder), "b": nn.Sequential(decoder)}
    module = MultiTaskModule(trunk(), own, regressions())
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have no parameters of their own.*shares_trunk=True"):
        fit(module, loader(batch()), callbacks=[TaskLearningRate(GradientNorm())])
    fit(module, loader(batch()), callbacks=[TaskLearningRate(Importance({"a": 2.0}), shares_trunk=True)])


def test_values_that_are_no_factors() -> None:
    class Wrong(Factor):
        def values(self) -> torch.Tensor:
            return torch.tensor([1.0, -1.0])

    with pytest.raises(ValueError, match=r"Wrong.values returned \[1.0, -1.0\]; 2 tasks need"):
        fit(small(), loader(batch()), callbacks=[TaskLearningRate(Wrong())])
