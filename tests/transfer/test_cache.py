"""Scores kept on disk: found again where nothing has changed, whole or not at all."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from lightning_mtl.transfer import SingleTaskBaselines, only_tasks, single_task_baselines
from lightning_mtl.transfer.cache import ScoreCache, configuration, digest
from tests.small import regressions, small
from tests.training import quiet_trainer
from tests.transfer.fits import Counted, counted_trainer, quiet_data


class Own(MultiTaskModule):
    """Holds in attributes what its methods use."""

    def __init__(
        self, *, lr: float = 0.1, keep: float = 1.0, loss: Any = mse_loss, missing: float | None = None
    ) -> None:
        tasks = {task: Task(loss, missing=missing) for task in "ab"}
        super().__init__(nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in "ab"}, tasks)
        self.lr, self.keep = lr, keep

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Decorated(Own):
    """The same, with one method more."""

    @torch.no_grad()
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().validation_step(*args, **kwargs)


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


def described(module: MultiTaskModule, **trainer: Any) -> dict[str, Any]:
    return configuration(only_tasks(module, ["a"]), quiet_trainer(**{"max_epochs": 3} | trainer))


def own(cls: type[Own] = Own, **changed: Any) -> Own:
    torch.manual_seed(0)
    return cls(**changed)


@pytest.mark.parametrize(
    ("changed", "trainer", "part"),
    [
        ({"lr": 0.01}, {}, "parts"),
        ({"keep": 0.1}, {}, "parts"),
        ({"cls": Decorated}, {}, "parts"),
        ({"missing": float("nan")}, {}, "tasks"),
        ({"loss": l1_loss}, {}, "tasks"),
        ({"loss": lambda p, t: 2 * mse_loss(p, t)}, {}, "tasks"),
        ({"loss": nn.HuberLoss(delta=0.01)}, {}, "tasks"),
        ({"loss": functools.partial(huber_loss, delta=0.01)}, {}, "tasks"),
        ({}, {"max_time": "00:00:01:00"}, "trainer"),
        ({}, {"callbacks": [pl.callbacks.EarlyStopping("val/loss/total")]}, "trainer"),
        ({}, {"callbacks": [pl.callbacks.GradientAccumulationScheduler({1: 2})]}, "trainer"),
    ],
)
def test_what_is_compared_besides_the_key(changed: dict[str, Any], trainer: dict[str, Any], part: str) -> None:
    module = own()
    first, second = described(module), described(own(**changed), **trainer)
    assert first == described(own()) == described(module)
    assert first[part] != second[part]
    assert first["weights"] == second["weights"]
    assert digest(first) != digest(second)


def test_arguments_of_losses_are_compared_and_folders_and_baselines_are_not(tmp_path: Path) -> None:
    assert described(own(loss=nn.HuberLoss()))["tasks"] != described(own(loss=nn.HuberLoss(delta=0.1)))["tasks"]
    module = own()
    before = described(module, callbacks=[pl.callbacks.ModelCheckpoint(tmp_path / "a")], enable_checkpointing=True)
    module.tasks["a"].baseline = {"loss": 1.0}
    saving = [pl.callbacks.ModelCheckpoint(tmp_path / "b")]
    assert described(module, callbacks=saving, enable_checkpointing=True) == before


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


def test_without_a_key_an_interrupted_call_alone_is_remembered(factory: Callable[[], pl.Trainer]) -> None:
    module, data, stops = small(), quiet_data(), [False, True, False, False, False]

    def gives_out() -> pl.Trainer:
        if stops.pop(0):
            raise TimeoutError
        return factory()

    def trained(trainers: Callable[[], pl.Trainer]) -> SingleTaskBaselines:
        return single_task_baselines(module, data, trainers, seeds=(0, 1), tasks=["a"])

    with pytest.raises(TimeoutError):
        trained(gives_out)
    first = trained(gives_out)
    assert Counted.fits == 2
    assert first == trained(gives_out)  # it has come to its end, and begins anew
    assert Counted.fits == 4


def test_files_of_an_earlier_version_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "0123456789abcdef0123.json").write_text('{"scores": {"loss": 1.0}}')
    with pytest.warns(UserWarning, match="has 1 scores of an earlier version of this package, which are not read"):
        cache = ScoreCache(tmp_path)
    cache.path({"task": "a"}).write_text('{"edition": 1, "scores": {"loss": 1.0}}')
    assert cache.read({"task": "a"}) is None
    cache.write({"task": "a"}, {"loss": float("nan")})
    assert math.isnan((cache.read({"task": "a"}) or {})["loss"])


class Breaks(MultiTaskModule):
    """Has a loss of task b that is not finite under one seed."""

    broken = False

    def task_losses(self, batch: Any) -> Any:
        found = dict(super().task_losses(batch))
        if self.broken:
            output = found["b"]
            assert isinstance(output, TaskOutput)
            output.loss = output.loss * math.nan
        return found


@pytest.mark.filterwarnings("ignore:Step 0 is skipped")
def test_a_seed_that_diverges_leaves_the_others_their_scores(tmp_path: Path, factory: Callable[[], pl.Trainer]) -> None:
    def module(seed: int) -> MultiTaskModule:
        made = small(cls=Breaks, max_skipped_steps=1)
        assert isinstance(made, Breaks)
        made.broken = seed == 1
        return made

    def alone() -> SingleTaskBaselines:
        return single_task_baselines(module, quiet_data(), factory, seeds=(0, 1), cache_dir=tmp_path, key="k")

    with pytest.warns(UserWarning, match="The run with seed 1 diverged and has no score: 2 steps in a row"):
        first = alone()
    assert [math.isfinite(own[task]["loss"]) for own in first.scores for task in "ab"] == [True, True, True, False]
    assert first.means()["b"] == first.scores[0]["b"]
    assert first.means()["a"]["loss"] == sum(own["a"]["loss"] for own in first.scores) / 2
    whole = small()
    with pytest.warns(UserWarning, match=r"baseline of task 'b' is without the seeds that diverged \(1 of 2 seeds\)"):
        first.fill(whole)
    assert whole.tasks["b"].baseline == first.scores[0]["b"]
    assert str(alone()) == str(first)  # it is known that it diverged
    assert Counted.fits == 4


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
