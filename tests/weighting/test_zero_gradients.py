"""A task whose gradient is zero in a step stops no other: every method weighs the others as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Signals, Task, Weighting
from lightning_mtl.method import complaints
from lightning_mtl.weighting import CRMOGM, MGDA, FairGrad, FromTorchJD, GradNorm, NashMTL
from tests.contract import Row, ask, course, direction_of, label, names, run, signals
from tests.contract_rows import AGGREGATORS, MAKES, ROWS
from tests.training import Steps, fit, loader

OTHERS = [0, 2, 3]
measuring = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.make().measures in ("norms", "gramian")], ids=lambda row: row.label
)


def with_zero_row() -> list[Signals]:
    return course(4, gradient_scale=torch.tensor([1.0, 0.0, 1.0, 1.0]))


@measuring
def test_the_others_get_the_weights_of_the_others_alone(row: Row) -> None:
    weights = run(row.make(), with_zero_row(), names(4))
    alone = run(row.make(), [given.cut(OTHERS) for given in course(4)], [names(4)[i] for i in OTHERS])
    torch.testing.assert_close(weights[:, OTHERS], alone)
    measured = weights[: 3 : row.make().every_n_steps, 1]  # Frozen measures no more
    # Where a part of what is shared is measured, the rest may be trained by that task, too.
    kept = alone[: 3 : row.make().every_n_steps].mean(1) if row.make().at != "trunk" else torch.zeros_like(measured)
    torch.testing.assert_close(measured, kept)


@measuring
def test_its_state_stays_as_it_was(row: Row) -> None:
    weighting = row.make()
    run(weighting, course(4), names(4))
    before = weighting.state_dict()["state"]
    ask(weighting, with_zero_row()[0])
    for name, state in weighting.state_dict()["state"].items():
        if state.ndim and len(state) == 4 and name not in ("held_weights", "zero_gradient_steps"):
            assert torch.equal(state[1].nan_to_num(7.0), before[name][1].nan_to_num(7.0))


@measuring
def test_without_any_gradient_the_tasks_weigh_the_same(row: Row) -> None:
    weights = run(row.make(), course(4, gradient_scale=0.0), names(4))
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize("make", AGGREGATORS)
def test_aggregators_combine_the_other_rows(make: Callable[[], Any]) -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    found = []
    for positions in (range(4), OTHERS):
        aggregator, given = make(), course(4)[0].cut(list(positions))
        aggregator.reset(list(given.tasks))
        found.append(direction_of(aggregator, given, rows[list(positions)]))
    torch.testing.assert_close(found[0], found[1])


def test_its_head_has_the_mean_of_the_others_weights() -> None:
    weighting, given = NashMTL(importance={"b": 3.0}, total=8.0), with_zero_row()[0]
    weighting.reset(given.tasks)
    decision = weighting.decide(given, range(4), measured=True)
    assert decision.head_weights is not None
    assert float(decision.weights.sum()) == pytest.approx(8.0)
    expected = decision.weights.clone()
    expected[1] = 3.0 * 8.0 / 3
    torch.testing.assert_close(decision.head_weights, expected)
    # In a step that measures nothing, the zero is not known, and the head's weight is held.
    held = NashMTL(every_n_steps=2)
    held.reset(given.tasks)
    first, then = ask(held, given), ask(held, course(4)[1])
    torch.testing.assert_close(then[OTHERS], first[OTHERS])
    torch.testing.assert_close(then[1], first[OTHERS].mean())


def test_such_steps_are_counted_and_the_first_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(complaints, "rank_zero_info", said.append)
    for weighting in (NashMTL(), CRMOGM(NashMTL())):
        run(weighting, with_zero_row(), names(4))
        assert weighting.zero_gradient_steps.tolist() == [0, 6, 0, 0]
    assert [text.partition(" at")[0] for text in said] == [
        f"{name}: the gradients of ['b'] are zero" for name in ("NashMTL", "CRMOGM")
    ]


CONTINUOUS = ("NashMTL", "FairGrad", "GradientNormBalance", "CAGrad", "UPGrad", "DualProj", "IMTLG", "AlignedMTL")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in CONTINUOUS], ids=lambda row: row.label)
def test_a_vanishing_gradient_and_a_vanished_one_are_the_same_to_the_others(row: Row) -> None:
    generator = torch.Generator().manual_seed(3)
    for num_tasks in (2, 3, 6):
        rows = torch.randn(num_tasks, 9, generator=generator, dtype=torch.float64)
        directions = []
        for scale in (0.0, 1e-30, 1e-12, 1e-8, 1e-6):
            rows_now = rows * torch.tensor([scale] + [1.0] * (num_tasks - 1), dtype=torch.float64)[:, None]
            weights = run(row.make(), [signals(torch.ones(num_tasks), rows_now)], names(num_tasks))[0]
            directions.append(weights.double() @ rows_now)
        for direction in directions[1:]:
            assert float((direction - directions[0]).norm()) <= 1e-3 * float(directions[0].norm())


def test_gradnorm_lets_no_idle_task_take_the_weight() -> None:
    given = course(2, steps=300, gradient_scale=torch.tensor([1.0, 0.0]))
    weights = run(GradNorm(lr=0.025), given, names(2))
    assert torch.equal(weights[:, 0], torch.ones(300))


def unlabeled(prediction: Tensor, _: Tensor) -> Tensor:
    return 0.0 * prediction.sum()


def fitted(weighting: Weighting, **heads: nn.Module) -> tuple[MultiTaskModule, MultiTaskModule, Steps]:
    """The module before and after a short training, and the steps."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        own = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1), "c": nn.Linear(4, 1)} | heads
        tasks = {"a": Task(mse_loss), "b": Task(mse_loss), "c": Task(unlabeled)}
        found.append(MultiTaskModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), own, tasks, optimizer=sgd))
    generator, steps = torch.Generator().manual_seed(1), Steps()
    batches = [
        (torch.randn(6, 3, generator=generator), {t: torch.randn(6, 1, generator=generator) for t in "abc"})
        for _ in range(6)
    ]
    fit(found[1], loader(*batches), callbacks=[weighting, steps])
    return found[0], found[1], steps


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.mark.parametrize("make", [make for make in MAKES if make().measures != "losses"], ids=label)
def test_the_trunk_and_the_other_heads_train(make: Callable[[], Weighting]) -> None:
    before, after, _ = fitted(make())
    for part in ("trunk", "heads.a", "heads.b"):
        for one, other in zip(
            before.get_submodule(part).parameters(), after.get_submodule(part).parameters(), strict=True
        ):
            assert other.isfinite().all()
            assert float((one - other).detach().norm()) > 1e-4


class Apart(nn.Module):
    """A head that reads the inputs of no trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return self.bias.expand(len(z), 1)


@pytest.mark.parametrize("make", [NashMTL, MGDA, FairGrad], ids=label)
def test_a_loss_that_does_not_reach_the_trunk_trains_its_head(make: Callable[[], Weighting]) -> None:
    _, after, _ = fitted(make(), b=Apart())
    assert [float(bias.detach()) for bias in after.heads["b"].parameters()] != [1.0]


def test_heads_that_begin_at_zero_train_under_any_function_of_the_gramian() -> None:
    heads = {task: nn.Linear(4, 1) for task in "ab"}
    for head in heads.values():
        nn.init.zeros_(head.weight)
    inverse = FromTorchJD(lambda gramian: 1 / gramian.diagonal().sqrt())
    before, after, steps = fitted(inverse, **heads)
    assert len(steps.signals) == 6
    assert not torch.equal(next(before.trunk.parameters()), next(after.trunk.parameters()))


def test_a_nearly_zero_gradient_keeps_what_the_method_says() -> None:
    given = course(3, steps=1, gradient_scale=torch.tensor([1.0, 1e-20, 1.0]))[0]
    weighting = MGDA()
    weighting.reset(list(given.tasks))
    torch.testing.assert_close(ask(weighting, given), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_fairgrad_can_be_bounded(alpha: float) -> None:
    given = course(3, steps=1, gradient_scale=torch.tensor([1.0, 1e-4, 1e-9]))[0]
    assert given.gramian is not None
    bounded, ordinary = FairGrad(alpha, max_norm=1.0), FairGrad(alpha)
    weights = bounded.weigh(given)
    assert float(weights @ given.gramian @ weights) == pytest.approx(1.0)
    with pytest.warns(UserWarning, match=rf"FairGrad\(alpha={alpha}\) makes the shared gradient .* pass max_norm=1.0"):
        free = ordinary.weigh(given)
    torch.testing.assert_close(weights / weights.sum(), free / free.sum())
    assert torch.equal(ordinary.weigh(given), free), "it is said once"
    assert torch.equal(FairGrad(alpha, max_norm=1e12).weigh(given), free)
