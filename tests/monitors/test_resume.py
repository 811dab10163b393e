"""A monitor goes on after an interruption with what it had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mtl import Monitor
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity
from tests.monitors.watched import batches, module
from tests.training import fit, loader, quiet_trainer


def watching() -> list[Monitor]:
    return [
        GradientConflict(2, figure=False),
        GradientConflict(1, "features", figure=False, name="features"),
        TaskAffinity(1, exact=True, lr=0.01, figure=False),
        Convergence(1),
    ]


def state(monitors: list[Monitor]) -> list[object]:
    return [monitor.state_dict() for monitor in monitors]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    data = batches(6)
    whole = watching()
    quiet_trainer(max_epochs=2, callbacks=whole).fit(module(), loader(*data), loader(*data[:2]))

    first = quiet_trainer(max_epochs=1, callbacks=watching())
    first.fit(module(), loader(*data), loader(*data[:2]))
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["callbacks"]
    assert {"GradientConflict{'name': 'conflict'}", "TaskAffinity{'name': 'affinity'}", "Convergence"} <= kept.keys()
    numbers = torch.get_rng_state()
    resumed, model = watching(), module()
    second = quiet_trainer(max_epochs=2, callbacks=resumed)
    torch.set_rng_state(numbers)
    second.fit(model, loader(*data), loader(*data[:2]), ckpt_path=path)
    for ours, theirs in zip(resumed, whole, strict=True):
        if isinstance(ours, GradientConflict | TaskAffinity) and isinstance(theirs, GradientConflict | TaskAffinity):
            assert torch.equal(ours.whole.sums, theirs.whole.sums)
        if isinstance(ours, Convergence) and isinstance(theirs, Convergence):
            assert ours.courses() == theirs.courses()
            assert ours.courses()[0].val_loss is not None


def test_state_of_other_tasks_is_left(tmp_path: Path) -> None:
    found = GradientConflict(1, figure=False)
    fit(module(), loader(*batches(2)), callbacks=[found])
    before = found.cosines
    found.load_state_dict({"tasks": ["other"], "epoch": torch.zeros(2, 1, 1), "whole": torch.zeros(2, 1, 1)})
    assert torch.equal(found.cosines, before)
    followed = Convergence(1)
    fit(module(), loader(*batches(2)), callbacks=[followed])
    courses = followed.courses()
    followed.load_state_dict(followed.state_dict() | {"tasks": ["other"]})
    assert followed.courses() == courses


@pytest.mark.parametrize("monitor", [GradientConflict(1, figure=False), Convergence(1)], ids=lambda m: type(m).__name__)
def test_a_new_fit_begins_anew(monitor: Monitor) -> None:
    fit(module(), loader(*batches(4)), callbacks=[monitor])
    fit(module(), loader(*batches(2)), callbacks=[monitor])
    if isinstance(monitor, GradientConflict):
        assert monitor.whole.sums[1].max() == 2
    if isinstance(monitor, Convergence):
        assert len(monitor.state_dict()["steps"]) == 2
