"""FAMO: the golden course, its Adam, and where the later losses come from."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

from lightning_mtl import MultiTaskModule, Signals, Task
from lightning_mtl.weighting import CRMOGM, FAMO
from tests.contract import ask, names, signals
from tests.small import batch, batches, small
from tests.training import Steps, fit, loader

pytestmark = pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning")

COURSE = [
    ([1.0, 2.0, 3.0], [0.9, 1.0, 2.9], [0.5454545440495868, 0.2727272733884297, 0.18181818256198345]),
    ([0.9, 1.0, 2.9], [0.8, 0.9, 2.0], [0.4615843390510839, 0.39516534754876836, 0.1432503134001478]),
    ([0.8, 0.9, 2.0], [0.7, 0.85, 1.9], [0.4529144204737984, 0.3695817393298618, 0.17750384019633986]),
]
LOGITS = [
    [0.024999995642303097, -0.024999998195716445, 0.024999996920780625],
    [0.048183242657642546, -0.03736498146246217, 0.02776302026265957],
    [0.061085761872350146, -0.046035921186326594, 0.03151041855937347],
]


def test_golden_course() -> None:
    weighting = FAMO(gamma=0.001)
    weighting.reset(list(names(3)))
    for step, ((losses, after, weights), logits) in enumerate(zip(COURSE, LOGITS, strict=True)):
        given = Signals(names(3), torch.tensor(losses), step, 0, losses_after=torch.tensor(after))
        torch.testing.assert_close(ask(weighting, given), torch.tensor(weights), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(weighting.logits, torch.tensor(logits), rtol=1e-5, atol=1e-7)


def test_the_next_batch_serves_as_the_losses_after() -> None:
    # In this course each step's later losses are the next step's, so that both forms agree; the free one a step late
    # in what it keeps, and in time in what it applies.
    weighting = FAMO(gamma=0.001, losses_after="next_batch")
    weighting.reset(list(names(3)))
    for step, (losses, _, weights) in enumerate(COURSE):
        torch.testing.assert_close(
            ask(weighting, signals(torch.tensor(losses), step=step)), torch.tensor(weights), rtol=1e-5, atol=0.0
        )
    torch.testing.assert_close(weighting.logits, torch.tensor(LOGITS[1]), rtol=1e-5, atol=1e-7)


def test_the_adam_is_torchs() -> None:
    torch.manual_seed(0)
    weighting = FAMO(gamma=0.01)
    weighting.reset(list(names(4)))
    logits = torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=0.01)
    for step in range(30):
        losses, after = torch.rand(4) + 0.1, torch.rand(4) + 0.1
        weighting.update(Signals(names(4), losses, step, 0, losses_after=after))
        adam.zero_grad()
        (logits.softmax(0) * (torch.log(losses + 1e-8) - torch.log(after + 1e-8))).sum().backward()
        adam.step()
    torch.testing.assert_close(weighting.logits, logits.detach(), rtol=1e-4, atol=1e-6)


def test_the_fastest_loses_weight() -> None:
    weighting = FAMO()
    weighting.reset(["a", "b"])
    for step in range(20):
        losses = torch.ones(2)
        weighting.update(Signals(("a", "b"), losses, step, 0, losses_after=torch.tensor([0.5, 0.99])))
    weights = weighting.weigh(signals(torch.ones(2)))
    assert weights[0] < weights[1]


def test_a_task_seen_for_the_first_time_stays_where_it_is() -> None:
    weighting = FAMO(losses_after="next_batch")
    weighting.reset(["a", "b", "c"])
    for step in range(3):
        ask(weighting, signals(torch.tensor([1.0, 0.5 / (1 + step)]), step=step, tasks=["a", "b"]))
    moved = weighting.logits.clone()
    ask(weighting, signals(torch.tensor([1.0, 0.1, 7.0]), step=3))
    assert weighting.logits[2] == 0
    assert weighting.steps.tolist() == [3, 3, 0]
    assert not torch.equal(weighting.logits[:2], moved[:2])


def test_min_losses() -> None:
    weighting = FAMO(min_losses={"a": -2.0})
    weighting.reset(["a", "b"])
    torch.testing.assert_close(ask(weighting, signals(torch.tensor([-1.0, 3.0]))), torch.tensor([0.75, 0.25]))
    plain = FAMO()
    plain.reset(["a", "b"])
    with pytest.raises(ValueError, match=r"FAMO takes the logarithm of each loss"):
        ask(plain, signals(torch.tensor([-1.0, 3.0])))


def test_a_loss_below_its_bound_counts_as_one_at_it() -> None:
    weighting = FAMO(min_losses={"a": 0.5})
    weighting.reset(["a", "b"])
    given = Signals(("a", "b"), torch.tensor([0.4, 1.0]), 0, 0, losses_after=torch.tensor([0.3, 1.0]))
    assert ask(weighting, given).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert weighting.logits.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)  # nothing has moved


class Noisy(nn.Module):
    """A layer that an extra forward pass would leave a trace in, if it could."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.dropout(self.norm(self.layer(x))))
        return out


def noisy(cls: type[MultiTaskModule] = MultiTaskModule, **arguments: Any) -> MultiTaskModule:
    torch.manual_seed(2)
    tasks = {task: Task(mse_loss, MeanAbsoluteError()) for task in ("a", "b")}
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    return cls(Noisy(), {task: nn.Linear(4, 1) for task in tasks}, tasks, **(settings | arguments))


class Ignoring(FAMO):
    """Asks for the later losses, and does nothing with them."""

    def update(self, signals: Signals) -> None:
        assert signals.losses_after is not None or not self.wants_losses_after


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_second_forward_pass_leaves_no_trace(accumulate: int) -> None:
    found = {}
    for way in ("forward", "next_batch"):
        module = noisy(accumulate_grad_batches=accumulate)
        torch.manual_seed(0)
        trainer = fit(module, loader(*batches(6, 7, 8, 9)), callbacks=[Ignoring(losses_after=way)])
        found[way] = module.state_dict() | {"random": torch.rand(3), "error": trainer.callback_metrics["loss_epoch/a"]}
    for name, value in found["forward"].items():
        assert torch.equal(value, found["next_batch"][name]), name


class Remembering(MultiTaskModule):
    """Computes the later losses the plain way."""

    def later(self, batches: list[Any]) -> Tensor:
        with torch.no_grad():
            found = [self.task_losses(one) for one in batches]
        return torch.stack([torch.stack([output[task].loss for task in ("a", "b")]) for output in found]).mean(0)  # type: ignore[union-attr]


class Comparing(FAMO):
    """Compares what it is told with the plain way."""

    module: Remembering
    given: list[Any]
    compared = 0

    def update(self, signals: Signals) -> None:
        assert signals.losses_after is not None
        torch.testing.assert_close(signals.losses_after, self.module.later(self.given))
        assert not torch.allclose(signals.losses_after, signals.losses)
        self.compared += 1
        super().update(signals)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_later_losses_are_the_same_samples_under_the_new_parameters(accumulate: int) -> None:
    given = [batch(seed=seed) for seed in range(accumulate)]
    module = small(cls=Remembering, accumulate_grad_batches=accumulate)
    assert isinstance(module, Remembering)
    weighting = Comparing()
    weighting.module, weighting.given = module, given
    fit(module, loader(*given), callbacks=[weighting], max_epochs=3)
    assert weighting.compared == 3


def test_in_a_fit() -> None:
    steps = Steps()
    fit(small(), loader(*batches(4, 4, 4)), callbacks=[CRMOGM(FAMO(), alpha=0.5), steps], max_epochs=2)
    assert len(steps.weights) == 6
    for weights in steps.weights:
        assert weights is not None
        assert float(weights.sum()) == pytest.approx(1.0)


def test_automatic_optimization_hides_the_step() -> None:
    module = small()
    module.automatic_optimization = True
    with pytest.raises(ValueError, match=r"FAMO\(losses_after='forward'\) has to follow the optimizer's step"):
        fit(module, loader(batch()), callbacks=[FAMO()])
    fit(module, loader(batch()), callbacks=[FAMO(losses_after="next_batch")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"FAMO\(lr=0.0\) must be above 0"),
        ({"gamma": -1.0}, r"FAMO\(gamma=-1.0\) must be at least 0"),
        ({"losses_after": "never"}, r"FAMO\(losses_after='never'\) must be 'forward' or 'next_batch'"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMO(**arguments)


def test_bounds_of_unknown_tasks() -> None:
    with pytest.raises(ValueError, match=r"FAMO\(min_losses=...\) names \['z'\], but the tasks are"):
        fit(small(), loader(batch()), callbacks=[FAMO(min_losses={"z": 0.0})])
