"""Main and auxiliary tasks: who is which, and what methods and monitors make of it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.monitors import GradientConflict, TaskAffinity
from lightning_mtl.weighting import MGDA, AuxiliaryCosine, MetaBalance
from tests.contract import ask, course, names, run, signals
from tests.small import batch, batches, heads, trunk
from tests.training import Steps, fit, loader


def module(**roles: Any) -> MultiTaskModule:
    torch.manual_seed(2)
    tasks = {task: Task(mse_loss, role=role) for task, role in roles.items()}
    return MultiTaskModule(trunk(), heads(roles), tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.1))


def test_a_role_is_one_of_two() -> None:
    with pytest.raises(ValueError, match=r"Task\(role='helper'\) must be 'main' or 'auxiliary'"):
        Task(mse_loss, role="helper")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("main", "roles", "message"),
    [
        (
            None,
            {"a": "main", "b": "main"},
            r"needs an auxiliary task, and all of \['a', 'b'\] are main; give one",
        ),
        (None, {"a": "auxiliary", "b": "auxiliary"}, r"needs a main and an auxiliary task, .* none is main"),
        ([], {"a": "main", "b": "main"}, "none is main"),
        (["a", "b"], {"a": "main", "b": "main"}, "none is auxiliary"),
        ("z", {"a": "main", "b": "main"}, r"\(main=...\) names \['z'\], but the tasks are \['a', 'b'\]"),
        ("b", {"a": "main", "b": "auxiliary"}, r"names \['b'\], which Task\(role=\"auxiliary\"\) calls auxiliary"),
        ("a", {"a": "main", "b": "auxiliary", "c": "main"}, r"leaves out \['c'\], whose Task\(role=\) is main"),
    ],
)
def test_roles_and_arguments_that_do_not_fit_are_refused(main: Any, roles: dict[str, str], message: str) -> None:
    for method in (MetaBalance, AuxiliaryCosine):
        with pytest.raises(ValueError, match=message):
            fit(module(**roles), loader(batch(tasks=roles)), callbacks=[method(main)])


def cosine_oracle(rows: Tensor, main: list[int]) -> Tensor:
    total = rows[main].sum(0)
    return torch.cosine_similarity(rows, total.expand_as(rows), dim=1).clamp(min=0)


def test_roles_and_arguments_say_the_same() -> None:
    data, found = loader(batch(8, tasks="abc")), []
    for main, roles in ((None, "maa"), ("a", "mmm"), (["a"], "maa")):
        steps, kinds = Steps(), {"m": "main", "a": "auxiliary"}
        model = module(**{task: kinds[role] for task, role in zip("abc", roles, strict=True)})
        fit(model, data, callbacks=[AuxiliaryCosine(main), steps])
        assert steps.weights[0] is not None
        assert steps.signals[0].gramian is not None
        found.append(steps.weights[0])
        values, vectors = torch.linalg.eigh(steps.signals[0].gramian)
        rows = vectors * values.clamp(min=0).sqrt()  # any with this Gramian
        expected = cosine_oracle(rows, [0])
        torch.testing.assert_close(found[-1], torch.cat([torch.ones(1), expected[1:].float()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_main_tasks() -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = signals(torch.ones(5), rows)
    expected = cosine_oracle(rows, [0, 3])
    expected[[0, 3]] = 1.0
    torch.testing.assert_close(AuxiliaryCosine(["a", "d"]).weigh(given), expected)
    torch.testing.assert_close(AuxiliaryCosine(["a", "d"], form="sign").weigh(given), (expected > 0).double())
    norms = rows.norm(dim=1)
    balance = MetaBalance(["a", "d"], relax=0.4)
    balance.reset(names(5))
    expected = 0.4 * norms[[0, 3]].mean() / norms + 0.6
    expected[[0, 3]] = 1.0
    torch.testing.assert_close(balance.weigh(given), expected.float())


def test_metabalance_follows_running_means() -> None:
    given = course(3, steps=5)
    weights = run(MetaBalance("a", relax=0.7, beta=0.8), given, names(3))
    mean = torch.zeros(3, dtype=torch.float64)
    for step, one in enumerate(given):
        assert one.norms is not None
        mean = 0.8 * mean + 0.2 * one.norms
        torch.testing.assert_close(weights[step, 1:].double(), 0.7 * mean[0] / mean[1:] + 0.3, rtol=1e-5, atol=0.0)


def absent(weighting: Weighting) -> Tensor:
    """The weights of b and c in a step without a, after one with all."""
    given = course(3, steps=2)
    weighting.reset(names(3))
    ask(weighting, given[0])
    return ask(weighting, given[1].cut([1, 2]))


def test_a_step_without_the_main_task() -> None:
    with pytest.warns(UserWarning, match="AuxiliaryCosine has no gradient of a main task at step 1"):
        assert absent(AuxiliaryCosine("a")).tolist() == [0.0, 0.0]
    given = course(3, steps=2)
    assert given[0].norms is not None
    assert given[1].norms is not None
    means = torch.stack([given[0].norms, given[1].norms])
    means = (0.09 * means[0] + 0.1 * means[1]) / 0.19
    torch.testing.assert_close(absent(MetaBalance("a")), (0.7 * given[0].norms[0] / means[1:] + 0.3).float())
    fresh = MetaBalance("a")
    fresh.reset(names(3))
    assert ask(fresh, given[0].cut([1, 2])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("over", ["all", "main"])
def test_monitors_count_who_helped_and_delta_m_may_leave_auxiliary_tasks_out(over: Any) -> None:
    data, val, steps = loader(*batches(4, 4, 4, 4, 4, tasks="abc")), loader(batch(tasks="abc")), Steps()
    conflict, affinity = GradientConflict(1, figure=False), TaskAffinity(1, lr=0.1, figure=False)
    model = module(a="main", b="auxiliary", c="main")
    for task, baseline in zip("abc", (0.5, 0.1, 0.4), strict=True):
        model.tasks[task].baseline = {"loss": baseline}
    model.delta_m_over = over
    trainer = fit(model, data, val, callbacks=[MGDA(), conflict, affinity, steps])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    cosines, changes = [], []
    for one in steps.signals:
        assert one.gramian is not None
        values, vectors = torch.linalg.eigh(one.gramian)
        rows = vectors * values.clamp(min=0).sqrt()  # any with this Gramian
        cosines.append(float(torch.cosine_similarity(rows[1], rows[0] + rows[2], dim=0)))
        changes.append(float(0.1 * (one.gramian[1, [0, 2]] / one.losses[[0, 2]].double()).mean()))
    for name, monitor, found in (("conflict", conflict, cosines), ("affinity", affinity, changes)):
        share = sum(value > 0 for value in found) / len(found)
        assert monitor.helped == {"b": pytest.approx(share)}
        assert logged[f"{name}/helped/b"] == pytest.approx(share)
        assert logged[f"{name}/main/b"] == pytest.approx(found[-1], rel=1e-4)
    compared = "abc" if over == "all" else "ac"
    baselines = {"a": 0.5, "b": 0.1, "c": 0.4}
    expected = sum((logged[f"val/loss/{t}"] / baselines[t] - 1) * 100 for t in compared) / len(compared)
    assert logged["val/delta_m"] == pytest.approx(expected, rel=1e-4)
    resumed = GradientConflict(1, figure=False)
    resumed.load_state_dict(conflict.state_dict())
    assert resumed.helped == conflict.helped
