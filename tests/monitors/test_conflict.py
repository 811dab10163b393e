"""The conflict measures equal those of float64 gradients taken one task at a time."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.monitors import GradientConflict, TaskAffinity, conflict_measures, cosines, magnitude_similarity
from lightning_mtl.training import observation
from lightning_mtl.weighting import MGDA, GradNorm
from tests.small import batch, batches, small
from tests.training import Memory, fit, loader

TASKS = ("a", "b", "c")
PLACES = ("trunk", "features", "last_layer", ["trunk.0", "trunk.2"])


def gradients(module: MultiTaskModule, given: Any, at: Any) -> list[Tensor]:
    """Each task's gradient, flat, by nothing but autograd."""
    inputs, targets = given
    trunk = module.trunk
    assert isinstance(trunk, nn.Sequential)
    found = []
    for task in TASKS:
        features = trunk(inputs)
        loss = module.tasks[task].loss(module.heads[task](features), targets[task])
        wanted = {
            "trunk": list(trunk.parameters()),
            "features": [features],
            "last_layer": list(trunk[2].parameters()),
        }.get(str(at), [*trunk[0].parameters(), *trunk[2].parameters()])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]))
    return found


def expected(rows: list[Tensor]) -> dict[str, float]:
    pairs = list(itertools.combinations(rows, 2))
    angles = [float(a @ b / a.norm() / b.norm()) for a, b in pairs]
    sizes = [float(2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)) for a, b in pairs]
    return {
        "fraction": sum(angle < 0 for angle in angles) / len(angles),
        "mean_cosine": sum(angles) / len(angles),
        "min_cosine": min(angles),
        "gms": sum(sizes) / len(sizes),
    }


@pytest.mark.parametrize("at", PLACES, ids=str)
@pytest.mark.parametrize("weighting", [None, MGDA(at="features"), MGDA(), GradNorm()], ids=lambda w: type(w).__name__)
def test_scalars_equal_autograd(at: Any, weighting: Weighting | None) -> None:
    module = small(TASKS).double()
    inputs, targets = batch(tasks=TASKS)
    given = inputs.double(), {task: 2 * target.double() - 1 for task, target in targets.items()}
    rows = gradients(copy.deepcopy(module), given, at)
    memory, monitor = Memory(), GradientConflict(1, at, figure=False)
    fit(module, loader(given), callbacks=[monitor] if weighting is None else [monitor, weighting], logger=memory)
    logged = {k: v for _, line in memory.lines for k, v in line.items() if k.startswith("conflict/")}
    assert logged == {f"conflict/{name}": pytest.approx(value, abs=1e-6) for name, value in expected(rows).items()}
    unit = torch.stack([row / row.norm() for row in rows])
    torch.testing.assert_close(monitor.cosines, unit @ unit.T, atol=1e-9, rtol=0)


def test_the_weightings_gramian_is_used_where_it_is_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(observation, "gradients_beside", refuse)
    for at in ("trunk", "features"):
        monitor = GradientConflict(1, at, figure=False)
        fit(small(), loader(*batches(4, 4)), callbacks=[monitor, MGDA(at=at)])
        assert monitor.cosines.isfinite().all()
    with pytest.raises(UserWarning, match=r"GradientConflict is turned off.*measured twice"):
        fit(small(), loader(*batches(4, 4)), callbacks=[GradientConflict(1, "features", figure=False), MGDA()])


def test_only_one_step_of_n_is_measured() -> None:
    monitor = GradientConflict(3, figure=False)
    fit(small(), loader(*batches(4, 4, 4, 4, 4)), callbacks=[monitor])
    assert monitor.whole.sums[1].tolist() == [[2, 2], [2, 2]]


def test_accumulated_steps_measure_the_first_micro_batch() -> None:
    first, second = batches(4, 4)
    monitors = [GradientConflict(1, figure=False) for _ in range(2)]
    fit(small(accumulate_grad_batches=2), loader(first, second), callbacks=[monitors[0]])
    fit(small(), loader(first), callbacks=[monitors[1]])
    torch.testing.assert_close(monitors[0].cosines, monitors[1].cosines)


def test_pairs_that_never_meet_stay_blank_and_zero_gradients_count_for_nothing() -> None:
    def without(given: Any, task: str) -> Any:
        return given[0], {name: target for name, target in given[1].items() if name != task}

    monitor = GradientConflict(1, figure=False)
    given = [without(batch(tasks=TASKS), task) for task in ("c", "b")]
    fit(small(TASKS), loader(*given), callbacks=[monitor])
    assert monitor.cosines.isnan().tolist() == [[False, False, False], [False, False, True], [False, True, False]]
    measures = conflict_measures(torch.diag(torch.tensor([1.0, 0.0, 4.0])))
    assert {name: float(value) for name, value in measures.items()} == pytest.approx(
        {"fraction": 0.0, "mean_cosine": 0.0, "min_cosine": 0.0, "gms": 0.8}
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_measures_do_not_depend_on_a_common_scale(scale: float) -> None:
    rows = torch.randn(4, 9, dtype=torch.float64)
    gramian = rows @ rows.T
    for measure in (cosines, magnitude_similarity):
        torch.testing.assert_close(measure(gramian * scale**2), measure(gramian))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0\) must be at least 1"):
        GradientConflict(0)
    with pytest.raises(ValueError, match=r"at=''\) must be"):
        GradientConflict(at="")
    with pytest.raises(ValueError, match=r"names \['trunk.9'\], which the module does not have"):
        fit(small(), loader(batch()), callbacks=[GradientConflict(at="trunk.9", figure=False)])
    with pytest.raises(ValueError, match="Two monitors log under 'conflict'"):
        fit(
            small(),
            loader(batch()),
            callbacks=[GradientConflict(figure=False), TaskAffinity(figure=False, name="conflict")],
        )
