"""What every weighting owes, by the rows of the contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lightning_mtl.weighting
from lightning_mtl import Aggregator, Signals, Weighting
from tests.contract import Golden, Row, ask, course, direction_of, names, run, signals
from tests.contract_rows import AGGREGATORS, ROWS
from tests.thinning import thinned

SCALES = [1e-8, 1e-4, 1.0, 1e4, 1e8]
each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)


def states(weighting: Weighting) -> dict[str, Tensor]:
    found: dict[str, Tensor] = weighting.state_dict()["state"]
    return found


def test_every_exported_weighting_has_a_row() -> None:
    exported = {
        name
        for name in lightning_mtl.weighting.__all__
        if inspect.isclass(getattr(lightning_mtl.weighting, name))
        and issubclass(getattr(lightning_mtl.weighting, name), Weighting)
    }
    assert {row.name for row in ROWS} | {type(make()).__name__ for make in AGGREGATORS} == exported


def test_every_weighting_of_the_package_is_exported() -> None:
    def below(cls: type) -> set[type]:
        children: list[type] = cls.__subclasses__()
        return {cls}.union(*(below(child) for child in children))

    found = {cls for cls in below(Weighting) if cls.__module__.startswith("lightning_mtl.weighting.")}
    assert {cls.__name__ for cls in found if not inspect.isabstract(cls)} <= set(lightning_mtl.weighting.__all__)


@each
def test_what_it_declares(row: Row) -> None:
    weighting = row.make()
    assert type(weighting).__name__ == row.name
    assert weighting.measures == row.measures
    assert weighting.weighs_heads is row.weighs_heads
    docstring = inspect.getdoc(type(weighting)) or ""
    for section in ("Args:", "Example:"):
        assert section in docstring


@each
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_weights(row: Row, num_tasks: int) -> None:
    weights = run(row.make(), course(num_tasks), names(num_tasks))
    assert weights.shape == (6, num_tasks)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert weights.isfinite().all()
    assert (weights >= row.lowest).all()
    if row.total is not None:
        total = float(num_tasks) if row.total == "K" else float(row.total)
        torch.testing.assert_close(weights.sum(1), torch.full((6,), total), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "golden"), [pytest.param(row, golden, id=row.label) for row in ROWS for golden in row.golden]
)
def test_golden(row: Row, golden: Golden) -> None:
    weighting, num_tasks = row.make(), len(golden.weights)
    weighting.reset(list(names(num_tasks)))
    for name, value in golden.state.items():
        setattr(weighting, name, torch.tensor(value, dtype=torch.float64))
    losses = torch.ones(num_tasks) if golden.losses is None else torch.tensor(golden.losses)
    rows = None if golden.rows is None else torch.tensor(golden.rows, dtype=torch.float64)
    weights = weighting.weigh(signals(losses.double(), rows)).double()
    torch.testing.assert_close(weights, torch.tensor(golden.weights, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:FairGrad.* makes the shared gradient:UserWarning")
@pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning")
@each
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
@pytest.mark.parametrize("of", thinned(["both", "losses", "gradients"], 3))
def test_finite_at_every_scale(row: Row, of: str, mixed: bool) -> None:
    for scale in SCALES:
        scales = torch.tensor([scale, 1.0, 1 / scale] if mixed else [scale] * 3)
        steps = course(
            3,
            loss_scale=1.0 if of == "gradients" else scales,
            gradient_scale=1.0 if of == "losses" else scales,
        )
        weighting = row.make()
        assert run(weighting, steps, names(3)).isfinite().all()
        broken = [name for name, state in states(weighting).items() if state.isinf().any()]
        assert broken == []


@pytest.mark.parametrize("row", [row for row in ROWS if row.equivariant], ids=lambda row: row.label)
def test_permuting_the_tasks_permutes_the_weights(row: Row) -> None:
    order = [2, 0, 3, 1]
    # What is given by name follows the names, wherever they stand.
    renamed = [names(4)[i] for i in order] if row.by_name else list(names(4))
    permuted = [_permute(given, order, renamed) for given in course(4)]
    weights = run(row.make(), course(4), names(4))
    torch.testing.assert_close(run(row.make(), permuted, renamed), weights[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", AGGREGATORS)
def test_aggregators(make: Callable[[], Aggregator]) -> None:
    def directions(aggregator: Aggregator, steps: range) -> Tensor:
        generator, found = torch.Generator().manual_seed(0), []
        for step, given in enumerate(course(3, steps=steps.stop)):
            rows = torch.randn(3, 50, generator=generator)
            if step in steps:
                found.append(direction_of(aggregator, given, rows))
                aggregator.observe(given, [0, 1, 2])
        return torch.stack(found)

    whole, interrupted, resumed = make(), make(), make()
    for aggregator in (whole, interrupted, resumed):
        aggregator.reset(["a", "b", "c"])
    expected = directions(whole, range(8))
    assert expected.isfinite().all()
    directions(interrupted, range(5))
    resumed.load_state_dict(interrupted.state_dict())
    assert torch.equal(directions(resumed, range(5, 8)), expected[5:])
    for rows in (torch.zeros(3, 4), torch.full((3, 4), 1e8), torch.full((1, 4), -1e-8)):
        direction = direction_of(whole, course(len(rows))[0], rows)
        torch.testing.assert_close(direction, rows.sum(0))


def _permute(given: Signals, order: list[int], tasks: list[str]) -> Signals:
    assert given.norms is not None
    assert given.gramian is not None
    assert given.scores is not None
    assert given.traces is not None
    return Signals(
        tuple(tasks),
        given.losses[order],
        given.step,
        given.epoch,
        norms=given.norms[order],
        gramian=given.gramian[order][:, order],
        scores=given.scores[order],
        traces=given.traces[order],
    )


@pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning")
@each
@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize("what", thinned(["both", "gradients", "losses"], 3))
def test_zeros(row: Row, what: str, which: str) -> None:
    factors = torch.zeros(3) if which == "all" else torch.tensor([1.0, 0.0, 1.0])
    steps = course(
        3,
        loss_scale=1.0 if what == "gradients" else factors,
        gradient_scale=1.0 if what == "losses" else factors,
    )
    weighting = row.make()
    assert run(weighting, steps, names(3)).isfinite().all()
    # And training goes on from there.
    for given in course(3, seed=1):
        assert ask(weighting, given).isfinite().all()


@each
def test_identical_tasks(row: Row) -> None:
    twins = [0, 1, 1]
    steps = [_permute(given, twins, list(names(3))) for given in course(2)]
    weights = run(row.make(), steps, names(3))
    assert weights.isfinite().all()
    if row.unique and not row.by_name:
        torch.testing.assert_close(weights[:, 1], weights[:, 2])
    elif row.unique is False:
        # The direction is what counts: that of the two tasks without the twin.
        alone = run(row.make(), course(2), names(2))
        torch.testing.assert_close(weights[:, 0], alone[:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[:, 1] + weights[:, 2], alone[:, 1], rtol=1e-5, atol=1e-6)


@each
def test_reset_begins_anew(row: Row) -> None:
    weighting, fresh = row.make(), row.make()
    first = run(weighting, course(3), names(3))
    weighting.reset(["a", "b", "c"])
    fresh.reset(["a", "b", "c"])
    for name, state in states(fresh).items():
        assert torch.equal(states(weighting)[name].nan_to_num(7.0), state.nan_to_num(7.0))
    assert torch.equal(run(weighting, course(3), names(3)), first)


@each
def test_state_goes_through_a_checkpoint(row: Row) -> None:
    steps = course(3, steps=8)
    weighting = row.make()
    expected = run(weighting, steps, names(3))
    interrupted = row.make()
    run(interrupted, steps[:5], names(3))
    resumed = row.make()
    resumed.reset(["a", "b", "c"])
    resumed.load_state_dict(interrupted.state_dict())
    rest = torch.stack([ask(resumed, given) for given in steps[5:]])
    assert torch.equal(rest, expected[5:])


@each
def test_absent_tasks_keep_their_state(row: Row) -> None:
    weighting = row.make()
    run(weighting, course(3), names(3))
    before = states(weighting)
    given = _permute(course(3, seed=2)[0], [0, 2], ["a", "c"])
    weights = ask(weighting, given)
    assert weights.shape == (2,)
    assert weights.isfinite().all()
    for name, state in states(weighting).items():
        if state.ndim and len(state) == 3:
            assert torch.equal(state[1].nan_to_num(7.0), before[name][1].nan_to_num(7.0))


@each
def test_what_it_was_given_stays_as_it_was(row: Row) -> None:
    weighting, given, untouched = row.make(), course(3), course(3)
    run(weighting, given, names(3))
    for found, expected in zip(given, untouched, strict=True):
        assert torch.equal(found.losses, expected.losses)
        assert found.gramian is not None
        assert expected.gramian is not None
        assert torch.equal(found.gramian, expected.gramian)
