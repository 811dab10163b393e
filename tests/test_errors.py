"""What the module refuses: each message names the parameter, what was found, and what to do instead."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, SumMetric

from lightning_mtl import MultiTaskModule, Signals, Task, TaskOutput, Weighting
from lightning_mtl.metrics import delta_m
from lightning_mtl.weighting import DTP, DWA, MGDA, GradNorm, StaticWeights, UncertaintyWeighting
from tests.small import batch, heads, regressions, small, trunk
from tests.training import fit, loader, quiet_trainer
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 1.0, "b": 1.0}


def says(*parts: str) -> str:
    """A pattern for a message that contains these parts in this order."""
    return ".*".join(re.escape(part) for part in parts)


NAME_RULE = "Task names become names of modules"


@pytest.mark.parametrize(
    "name", ["a.b", "", ".", "keys", "pop", "items", "values", "clear", "update", "forward", "training"]
)
def test_names_that_no_module_can_have(name: str) -> None:
    with pytest.raises(ValueError, match=says(f"{name!r} cannot name a task", NAME_RULE)):
        MultiTaskModule(trunk(), {name: nn.Linear(4, 1)}, {name: Task(mse_loss)})


def test_a_name_that_is_taken_comes_with_a_proposal() -> None:
    with pytest.raises(ValueError, match=says("'pop' cannot", "as 'pop' is; 'pop_task' would do")):
        MultiTaskModule(trunk(), {"pop": nn.Linear(4, 1)}, {"pop": Task(mse_loss)})
    numbered: Any = {1: nn.Linear(4, 1)}
    with pytest.raises(ValueError, match=says("1 cannot name a task", "non-empty string")):
        MultiTaskModule(trunk(), numbered, {1: Task(mse_loss)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trunk": 3}, TypeError, ("trunk must be a torch.nn.Module, found int",)),
        ({"heads": {}}, TypeError, ("heads must be a mapping {task: Module}", "found {}")),
        ({"tasks": []}, TypeError, ("tasks must be a mapping {task: Task}", "found []")),
        ({"heads": {"a": 1, "b": nn.Linear(4, 1)}}, TypeError, ("heads['a'] must be a Module, found int",)),
        ({"tasks": {"a": mse_loss, "b": Task(mse_loss)}}, TypeError, ("tasks['a'] must be a Task, found function",)),
        ({"heads": heads(["a"])}, ValueError, ("tasks ['b'] have no head; the heads are ['a']", "Name both alike")),
        ({"tasks": regressions(["b"])}, ValueError, ("heads ['a'] have no task; the tasks are ['b']", "Name both")),
        ({"accumulate_grad_batches": 0}, ValueError, ("accumulate_grad_batches=0 must be at least 1",)),
        ({"accumulate_grad_batches": 2.0}, TypeError, ("accumulate_grad_batches must be an int, found 2.0",)),
        ({"accumulate_grad_batches": True}, TypeError, ("accumulate_grad_batches must be an int, found True",)),
        ({"gradient_clip_val": 0.0}, ValueError, ("gradient_clip_val=0.0 must be above 0", "None for no clipping")),
        ({"gradient_clip_val": -1.0}, ValueError, ("gradient_clip_val=-1.0 must be above 0",)),
        ({"gradient_clip_val": float("nan")}, ValueError, ("gradient_clip_val=nan must be above 0",)),
        ({"gradient_clip_algorithm": "l1"}, ValueError, ("gradient_clip_algorithm='l1' must be 'norm' or 'value'",)),
    ],
)
def test_arguments_of_the_module(arguments: dict[str, Any], error: type[Exception], message: tuple[str, ...]) -> None:
    usual: dict[str, Any] = {"trunk": trunk(), "heads": heads(), "tasks": regressions()}
    with pytest.raises(error, match=says(*message)):
        MultiTaskModule(**(usual | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": 1.0}, TypeError, ("Task(loss=...) must be a function (prediction, target) -> scalar, found float",)),
        ({"metrics": [mse_loss]}, TypeError, ("Task(metrics=...)", "list or dict", "found function")),
        ({"metrics": "mae"}, TypeError, ("Task(metrics=...)", "found str")),
        ({"metrics": {"mae": "mae"}}, TypeError, ("Task(metrics=...)", "found str")),
        ({"metrics": {"loss": MeanAbsoluteError()}}, ValueError, ("metric 'loss'", "rename it")),
        ({"baseline": {"mae": 1.0}}, ValueError, ("Task(baseline=...) names 'mae'", "metrics are ['loss']")),
        ({"baseline": {"loss": 0.0}}, ValueError, ("Task(baseline=...) gives 'loss' the value 0", "Leave 'loss' out")),
        (
            {"metrics": SumMetric(), "baseline": {"SumMetric": 1.0}},
            ValueError,
            ("'SumMetric' does not say whether higher is better; leave it out",),
        ),
    ],
)
def test_arguments_of_a_task(arguments: dict[str, Any], error: type[Exception], message: tuple[str, ...]) -> None:
    with pytest.raises(error, match=says(*message)):
        Task(**({"loss": mse_loss} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0], [True]), ("found 1, 2 and 1",)),
        (([], [], []), ("at least one of each",)),
        (([1.0, 1.0], [0.5, 0.0], [True, False]), ("one of [0.5, 0.0] is 0; leave that metric out",)),
    ],
)
def test_arguments_of_delta_m(arguments: Any, message: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=says(*message)):
        delta_m(*arguments)


BATCH_RULE = "A batch must be (inputs, {task: target}) or {task: (inputs, target)} with tasks among ['a', 'b']"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.zeros(2, 3), "found Tensor"),
        ((torch.zeros(2, 3), torch.zeros(2)), "found a tuple of Tensor, Tensor"),
        ((torch.zeros(2, 3), {"c": torch.zeros(2)}), "found a tuple of Tensor, a mapping with the keys ['c']"),
        ({"c": (torch.zeros(2, 3), torch.zeros(2))}, "found a mapping with the keys ['c']"),
        ({"a": torch.zeros(2, 3)}, "found a mapping with the keys ['a']"),
        ({}, "found a mapping with the keys []"),
        ((torch.zeros(1), torch.zeros(1), {"a": None}), "found a tuple of Tensor, Tensor, a mapping"),
    ],
)
def test_batches_of_another_form(given: Any, found: str) -> None:
    with pytest.raises(ValueError, match=says(BATCH_RULE, found, "override task_losses")):
        small().task_losses(given)


class Returning(MultiTaskModule):
    answer: Any

    def task_losses(self, given: Any) -> Any:
        return self.answer(self, given[0])


def returning(answer: Any, **arguments: Any) -> MultiTaskModule:
    module = small(cls=Returning, **arguments)
    assert isinstance(module, Returning)
    module.answer = answer
    return module


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda _m, _x: 1.0, TypeError, ("task_losses must return {task: loss}, found float",)),
        (lambda _m, _x: {"c": torch.zeros(())}, ValueError, ("returned the tasks ['c']", "the module has ['a', 'b']")),
        (lambda _m, _x: {"a": 1.0}, TypeError, ("The loss of task 'a' must be a tensor, found float",)),
        (
            lambda _m, _x: {"a": torch.zeros(2)},
            ValueError,
            ("loss of task 'a' must be a scalar, found shape [2]", "mean"),
        ),
        (lambda _m, _x: {"b": TaskOutput(torch.zeros(2, 1))}, ValueError, ("loss of task 'b'", "found shape [2, 1]")),
    ],
)
def test_what_task_losses_may_not_return(answer: Any, error: type[Exception], message: tuple[str, ...]) -> None:
    with pytest.raises(error, match=says(*message)):
        fit(returning(answer), loader(batch()))


def without_trunk(module: MultiTaskModule, inputs: Tensor) -> dict[str, Tensor]:
    z = inputs
    for layer in module.trunk.children():
        z = layer(z)
    return {task: module.heads[task](z).mean() for task in module.tasks}


def detached(module: MultiTaskModule, inputs: Tensor) -> dict[str, Tensor]:
    z = module.trunk(inputs)
    return {"a": module.heads["a"](z).mean(), "b": module.heads["b"](z.detach()).mean()}


def test_losses_that_leave_the_trunk_out() -> None:
    weighting = fixed(WEIGHTS, "norms", at="features")
    with pytest.raises(ValueError, match=says("Fixed(at='features')", "trunk was not called", "self.trunk(inputs)")):
        fit(returning(without_trunk), loader(batch()), callbacks=[weighting])


@pytest.mark.parametrize("answer", [without_trunk, detached])
def test_weighting_by_losses_alone_needs_no_trunk(answer: Any) -> None:
    assert fit(returning(answer), loader(batch()), callbacks=[StaticWeights()]).global_step == 1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("trunk", ("Fixed(at='trunk')", "none of them can be trained; unfreeze some", "shared_parameters()")),
        ("features", ("Fixed(at='features')", "nothing the trunk returned requires a gradient", "unfreeze")),
        ("last_layer", ("at='last_layer'", "no trainable weight", "unfreeze one")),
        ("trunk.3", ("at=['trunk.3'] names ['trunk.3']", "it has ['trunk', 'trunk.0'")),
    ],
)
def test_a_frozen_trunk(place: str, message: tuple[str, ...]) -> None:
    module = small()
    if place == "trunk.3":
        module.trunk = module.trunk[:3]  # type: ignore[index]
    else:
        module.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=says(*message)):
        fit(module, loader(batch()), callbacks=[fixed(WEIGHTS, "norms", at=place)])


def two(module: Any) -> Any:
    return [torch.optim.SGD(module.trunk.parameters(), lr=0.1), torch.optim.SGD(module.heads.parameters(), lr=0.1)]


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (two, ("configure_optimizers returned 2 optimizers", "takes one", '"name": "trunk"', "chain")),
    ],
)
def test_optimizers(configure: Any, message: tuple[str, ...]) -> None:
    class Configured(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            return configure(self)

    with pytest.raises(ValueError, match=says(*message)):
        fit(small(cls=Configured), loader(batch()))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([GradNorm(), MGDA()], ("The Trainer holds 2 weightings, GradNorm and MGDA; keep one",)),
        ([GradNorm(importance={"c": 1.0})], ("GradNorm(importance=...) names ['c'], but the tasks are ['a', 'b']",)),
        ([StaticWeights({"c": 1.0})], ("StaticWeights(weights=...) names ['c'], but the tasks are ['a', 'b']",)),
        ([UncertaintyWeighting({"c": "regression"})], ("UncertaintyWeighting(kinds=...) names ['c']", "['a', 'b']")),
        ([DTP("accuracy")], ("DTP(metric='accuracy')", "metrics of task 'a', []", "MetricCollection")),
    ],
)
def test_refused_weightings(callbacks: list[Any], message: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=says(*message)):
        fit(small(), loader(batch()), callbacks=callbacks)


def test_a_weighting_beside_another_kind_of_module() -> None:
    class Plain(pl.LightningModule):
        def training_step(self, given: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> None:
            pass

    with pytest.raises(TypeError, match=says("DWA balances the tasks of a", "MultiTaskModule", "found Plain")):
        fit(Plain(), loader(batch()), callbacks=[DWA()])


def test_weights_of_the_wrong_shape() -> None:
    class Wrong(Weighting):
        def weigh(self, signals: Signals) -> Tensor:
            return torch.ones(3)

    with pytest.raises(ValueError, match=says("Wrong.weigh returned shape [3]; 2 tasks are present", "[2]")):
        fit(small(), loader(batch()), callbacks=[Wrong()])


def test_an_aggregator_has_no_weights() -> None:
    with pytest.raises(TypeError, match=says("WeightedSum is no weighted sum", "call combine")):
        WeightedSum(WEIGHTS).weigh(Signals(("a", "b"), torch.ones(2), step=0, epoch=0))


def test_states_with_a_name_that_is_taken() -> None:
    for name in ("weights", "weigh"):
        with pytest.raises(ValueError, match=says("GradNorm", repr(name), "the name is taken")):
            GradNorm().add_state(name, torch.tensor(0.0))


@pytest.mark.parametrize(
    ("arguments", "weighting", "message"),
    [
        ({"accumulate_grad_batches": 2}, None, ("accumulate_grad_batches=2", "Trainer(accumulate_grad_batches=...)")),
        ({"gradient_clip_val": 1.0}, None, ("gradient_clip_val=1.0", "Trainer(gradient_clip_val=...)")),
        ({}, WeightedSum({}, at="features"), ("WeightedSum(at='features')", "accumulate_grad_batches=2")),
    ],
)
def test_what_automatic_optimization_rules_out(arguments: Any, weighting: Any, message: tuple[str, ...]) -> None:
    module = small(**arguments)
    module.automatic_optimization = True
    trainer = {} if weighting is None else {"accumulate_grad_batches": 2}
    with pytest.raises(ValueError, match=says(*message)):
        fit(module, loader(batch()), callbacks=[] if weighting is None else [weighting], **trainer)


def test_several_evaluation_loaders() -> None:
    with pytest.raises(ValueError, match=says("Several evaluation loaders", "CombinedLoader", "max_size")):
        quiet_trainer().validate(small(), [loader(batch()), loader(batch())], verbose=False)


def test_two_of_one_weighting() -> None:
    # Lightning itself sees that they would share a place in the checkpoint.
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradNorm`"):
        fit(small(), loader(batch()), callbacks=[GradNorm(), GradNorm()])
