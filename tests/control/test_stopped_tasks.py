"""A dropped task is an absent one, a head alone is plain PyTorch on detached features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, TaskOutput, Weighting
from lightning_mtl.control import TaskEarlyStopping
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import FAMO, MGDA, PCGrad, UncertaintyWeighting
from tests.control.stopped import NEVER, TASKS, TRAIN, VAL, Detached, Lacking, adam, after_two, head_of
from tests.small import batches, small
from tests.test_precision import PRECISIONS
from tests.thinning import thinned
from tests.training import fit, flat_parameters, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 0.5, "b": 3.0, "c": 1.5}
METHODS: dict[str, Callable[[], list[Any]]] = {
    "equal": list,
    "losses, learned": lambda: [UncertaintyWeighting(lr=0.1)],
    "trunk": lambda: [MGDA()],
    "rows": lambda: [PCGrad()],
    "features": lambda: [MGDA(at="features")],
    "last layer": lambda: [fixed(WEIGHTS, "gramian", at="last_layer")],
    "heads at 1": lambda: [fixed(WEIGHTS, "losses", weighs_heads=False)],
    "aggregator": lambda: [WeightedSum(WEIGHTS)],
    "losses after": lambda: [FAMO(lr=0.1)],
    "every third": lambda: [MGDA(every_n_steps=3)],
    "rates": lambda: [TaskLearningRate(Importance({"a": 0.5, "b": 2.0}), shares_trunk=True)],
}
ACCUMULATING = ("equal", "losses, learned", "trunk", "rows", "heads at 1")
CASES = [(name, 1) for name in METHODS] + [(name, 2) for name in ACCUMULATING]


def trained(cls: type[MultiTaskModule], callbacks: list[Any], *, automatic: bool = False, **arguments: Any) -> Any:
    trainer_arguments = {name: arguments.pop(name) for name in ("max_epochs",) if name in arguments}
    if automatic:
        trainer_arguments["accumulate_grad_batches"] = arguments.pop("accumulate_grad_batches", 1)
    module = small(TASKS, cls=cls, optimizer=adam, **arguments)
    module.automatic_optimization = automatic
    trainer = fit(module, loader(*TRAIN), loader(*VAL), callbacks=callbacks, **({"max_epochs": 4} | trainer_arguments))
    return module, trainer


def remembered(trainer: Any) -> dict[str, Tensor]:
    """What the weighting keeps from step to step."""
    states = [callback.state_dict() for callback in trainer.callbacks if isinstance(callback, Weighting)]
    return {name: value for state in states for name, value in state.items() if isinstance(value, Tensor)}


def assert_equal_fits(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    (module, trainer), (other, reference) = found, expected
    for kept in (
        (flat_parameters(module), flat_parameters(other)),
        [t.optimizers[0].state_dict()["state"] for t in (trainer, reference)],
        (remembered(trainer), remembered(reference)),
    ):
        torch.testing.assert_close(*kept, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("name", "accumulate"), thinned(CASES, 4))
def test_a_dropped_task_is_one_that_the_batches_lack(name: str, accumulate: int) -> None:
    found = trained(MultiTaskModule, [after_two(), *METHODS[name]()], accumulate_grad_batches=accumulate)
    expected = trained(Lacking, METHODS[name](), accumulate_grad_batches=accumulate)
    # A window waits for a task that its first micro-batch lacks, and not for a dropped one: the same sum, in another
    # order.
    assert_equal_fits(found, expected, tolerance=1e-6 if (name, accumulate) == ("losses, learned", 2) else 0.0)
    everything = trained(MultiTaskModule, METHODS[name](), accumulate_grad_batches=accumulate)
    assert not torch.equal(flat_parameters(found[0]), flat_parameters(everything[0]))


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_task_is_dropped_in_automatic_optimization(accumulate: int) -> None:
    arguments: dict[str, Any] = {"automatic": True, "accumulate_grad_batches": accumulate}
    found = trained(MultiTaskModule, [after_two(), MGDA()], **arguments)
    assert_equal_fits(found, trained(Lacking, [MGDA()], **arguments))


class Reading(nn.Module):
    """Remembers what its trunk was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 4), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs) if self.training else 0
        features: Tensor = self.layer(inputs)
        return features


def test_a_dropped_task_with_inputs_of_its_own_is_not_computed() -> None:
    pairs = [{task: (x, y[task]) for task in TASKS} for x, y in batches(2, 2, tasks=TASKS)]
    module = MultiTaskModule(Reading(), {t: nn.Linear(4, 1) for t in TASKS}, {t: Task(mse_loss) for t in TASKS})
    fit(module, loader(*pairs), loader(*pairs), max_epochs=3, callbacks=[after_two()])
    assert module.trunk.seen == 2 * 2 * (3 + 3 + 2)


# Heads alone


def alone(name: str, **arguments: Any) -> Any:
    return trained(MultiTaskModule, [after_two(then="head_only"), *METHODS[name]()], **arguments)


@pytest.mark.parametrize("automatic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_head_alone_is_plain_training_on_detached_features(accumulate: int, automatic: bool) -> None:
    found = alone("equal", accumulate_grad_batches=accumulate, automatic=automatic)
    expected = trained(Detached, [], accumulate_grad_batches=accumulate, automatic=automatic)
    torch.testing.assert_close(flat_parameters(found[0]), flat_parameters(expected[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "accumulate"), thinned(CASES, 4))
def test_what_is_shared_and_the_other_heads_train_as_without_the_task(name: str, accumulate: int) -> None:
    module, trainer = alone(name, accumulate_grad_batches=accumulate)
    other, reference = trained(Lacking, METHODS[name](), accumulate_grad_batches=accumulate)
    pairs: list[Any] = [(module.trunk, other.trunk), *((module.heads[t], other.heads[t]) for t in ("a", "c"))]
    for part, twin in pairs:
        torch.testing.assert_close(flat_parameters(part), flat_parameters(twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(remembered(trainer), remembered(reference), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["16-mixed", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_a_head_alone_gets_the_same_gradient_in_half_precision(name: str) -> None:
    found, expected = (
        fit(
            module,
            loader(*TRAIN),
            loader(*VAL),
            callbacks=callbacks,
            max_epochs=4,
            plugins=[PRECISIONS[name]()],
        ).lightning_module
        for module, callbacks in (
            (small(TASKS, optimizer=adam), [after_two(then="head_only")]),
            (small(TASKS, cls=Detached, optimizer=adam), []),
        )
    )
    torch.testing.assert_close(flat_parameters(found), flat_parameters(expected), rtol=1e-3, atol=1e-3)


class Alone(MultiTaskModule):
    """A head's own training beside the fit: the same optimizer, on the features of each batch."""

    def on_train_start(self) -> None:
        self.copy: Any = nn.Linear(4, 1)
        self.rival: Any = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch < 2:
            return
        if self.rival is None:
            self.copy.load_state_dict(self.heads["b"].state_dict())
            self.rival = torch.optim.SGD(self.copy.parameters(), lr=0.1)
        inputs, targets = batch
        with torch.no_grad():
            features = self.trunk(inputs)
        self.rival.zero_grad()
        mse_loss(self.copy(features), targets["b"]).backward()
        self.rival.step()


@pytest.mark.parametrize("name", thinned(["equal", "trunk", "features", "rows", "heads at 1", "last layer"], 3))
def test_a_head_alone_has_weight_one_whatever_the_method(name: str) -> None:
    module: Any = small(TASKS, cls=Alone, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    callbacks = [after_two(then="head_only"), *METHODS[name]()]
    fit(module, loader(*TRAIN), loader(*VAL), callbacks=callbacks, max_epochs=4)
    assert module.rival is not None
    torch.testing.assert_close(flat_parameters(module.heads["b"]), flat_parameters(module.copy), rtol=1e-5, atol=1e-6)


class Counting(MultiTaskModule):
    """Says of how many samples each loss is a mean."""

    def task_losses(self, batch: Any) -> Any:
        losses: Any = super().task_losses(batch)
        return {task: TaskOutput(output.loss, num_samples=len(batch[0])) for task, output in losses.items()}


def test_epoch_means_of_a_head_alone_go_on_also_where_no_other_task_has_labels() -> None:
    train = [batch if number % 2 else (batch[0], {"b": batch[1]["b"]}) for number, batch in enumerate(TRAIN)]
    module = small(TASKS, cls=Counting, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    callbacks = [after_two(then="head_only")]
    trainer = fit(module, loader(*train), loader(*VAL), callbacks=callbacks, max_epochs=4)
    with torch.no_grad():
        errors = torch.cat([(module(x)["b"] - y["b"]).square() for x, y in train])
    assert float(trainer.callback_metrics["loss_epoch/b"]) == pytest.approx(float(errors.mean()), rel=1e-6)


def test_a_head_alone_learns_where_no_other_task_has_labels() -> None:
    train = [(x, {"b": y["b"]}) for x, y in TRAIN]
    module = small(TASKS, optimizer=adam)
    heads: list[list[Tensor]] = []
    trunks: list[Tensor] = []

    class Watch(TaskEarlyStopping):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            heads.append(head_of(pl_module, "b"))
            trunks.append(flat_parameters(pl_module.trunk))

    stopping = Watch("loss", patience={"b": 1, "a": NEVER, "c": NEVER}, min_delta=1e6, then="head_only")
    fit(module, loader(*train), loader(*VAL), callbacks=[stopping], max_epochs=4)
    assert torch.equal(trunks[1], trunks[3])
    assert not torch.equal(heads[1][0], heads[3][0])
