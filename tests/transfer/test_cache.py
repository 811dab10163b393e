"""Scores kept on disk: found again where nothing has changed, whole or not at all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.transfer import SingleTaskBaselines, single_task_baselines
from lightning_mtl.transfer.cache import ScoreCache
from tests.small import regressions, small
from tests.transfer.fits import Counted, counted_trainer, quiet_data


class Penalized(MultiTaskModule):
    """Another class with the same parts."""


def cached(folder: Path, factory: Callable[[], pl.Trainer], **changed: Any) -> SingleTaskBaselines:
    arguments: dict[str, Any] = {"seeds": (0, 1), "key": "small", "module": small()} | changed
    return single_task_baselines(arguments.pop("module"), quiet_data(), factory, cache_dir=folder, **arguments)


def test_a_second_call_trains_nothing(tmp_path: Path, factory: Callable[[], pl.Trainer]) -> None:
    first = cached(tmp_path, factory)
    assert Counted.fits == 4
    module = small()
    asked = []

    def counting() -> pl.Trainer:
        asked.append(factory())
        return asked[-1]

    assert cached(tmp_path, counting, module=module) == first
    assert Counted.fits == 4
    assert len(asked) == 1
    assert module.tasks["a"].baseline == first.means()["a"]


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "other data"},
        {"seeds": (2,)},
        {"stage": "test"},
        {"module": small(optimizer=functools.partial(torch.optim.SGD, lr=0.5))},
        {"module": small(accumulate_grad_batches=2)},
        {"module": small(cls=Penalized)},
        {"module": MultiTaskModule(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, regressions())},
        {"factory": functools.partial(counted_trainer, 4)},
        {"factory": functools.partial(counted_trainer, 3, limit_train_batches=1)},
    ],
)
def test_whatever_a_run_depends_on_has_it_repeated(
    changed: dict[str, Any], tmp_path: Path, factory: Callable[[], pl.Trainer]
) -> None:
    cached(tmp_path, factory, seeds=(0,))
    arguments = {"seeds": (0,)} | {name: value for name, value in changed.items() if name != "factory"}
    cached(tmp_path, changed.get("factory", factory), **arguments)
    assert Counted.fits == 4


def test_other_weights_have_a_run_repeated_and_progress_bars_do_not(
    tmp_path: Path, factory: Callable[[], pl.Trainer]
) -> None:
    cached(tmp_path, factory)
    module = small()
    with torch.no_grad():
        module.heads["a"].bias.add_(1e-3)  # type: ignore[operator]
    cached(tmp_path, factory, module=module)
    assert Counted.fits == 8
    cached(tmp_path, functools.partial(counted_trainer, 3, enable_model_summary=True))
    assert Counted.fits == 8


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, factory: Callable[[], pl.Trainer]) -> None:
    def gives_out() -> pl.Trainer:
        if Counted.fits == 3:
            raise TimeoutError
        return factory()

    with pytest.raises(TimeoutError):
        cached(tmp_path, gives_out)
    assert len(list(tmp_path.iterdir())) == 3
    resumed = cached(tmp_path, factory)
    assert Counted.fits == 4
    assert resumed == cached(tmp_path / "other", factory)


def test_a_write_that_breaks_off_leaves_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, target: Path) -> None:
        raise OSError("disk full")

    cache = ScoreCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            cache.write({"task": "a"}, {"loss": 1.0})
    assert cache.read({"task": "a"}) is None
    assert not list(tmp_path.iterdir())
    cache.write({"task": "a"}, {"loss": 1 / 3})
    assert cache.read({"task": "a"}) == {"loss": 1 / 3}
    assert json.loads(cache.path({"task": "a"}).read_text())["configuration"] == {"task": "a"}
    cache.path({"task": "a"}).write_text('{"scores": [')
    with pytest.raises(ValueError, match=r"is no file of scores .*delete it"):
        cache.read({"task": "a"})
