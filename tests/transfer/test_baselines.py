"""Tasks trained alone: as a model of that task alone trains, once each, and compared by the right scores."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, StackDataset

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from lightning_mtl.transfer import SingleTaskBaselines, only_tasks, single_task_baselines, task_scores, train_and_score
from lightning_mtl.weighting import MGDA
from tests.small import batch, batches, binary, regressions, small
from tests.training import fit, flat_parameters, loader, quiet_trainer
from tests.transfer.fits import Counted, Data, quiet_data


def plain_loss_of(task: str) -> float:
    """A model with the trunk and one head of ``small()``, trained by an ordinary loop."""
    module = small()
    trunk, head = module.trunk, module.heads[task]
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=1.0)
    for _ in range(3):
        for inputs, targets in batches(4, 5):
            optimizer.zero_grad()
            mse_loss(head(trunk(inputs)), targets[task]).backward()
            optimizer.step()
    inputs, targets = batch(6, seed=9)
    return mse_loss(head(trunk(inputs)), targets[task]).item()


@pytest.mark.parametrize("data", [quiet_data, Data])
def test_each_task_ends_where_a_model_of_it_alone_ends(data: Any, factory: Callable[[], pl.Trainer]) -> None:
    module = small()
    before = flat_parameters(module)
    alone = single_task_baselines(module, data(), factory)
    assert alone.tasks == ("a", "b")
    for task in alone.tasks:
        assert alone.scores[0][task]["loss"] == pytest.approx(plain_loss_of(task), rel=1e-5)
        assert module.tasks[task].baseline == {"loss": alone.scores[0][task]["loss"]}
    assert flat_parameters(module).equal(before)
    assert Counted.fits == 2
    assert "val/delta_m" in fit(module, *quiet_data()).callback_metrics


class Indexes(MultiTaskModule):
    """Computes every loss, needs every head, and its trunk has no use for absent targets."""

    def task_losses(self, batch: Any) -> Mapping[str, Tensor | TaskOutput]:
        inputs, targets = batch
        found = self(inputs)
        return {"a": mse_loss(found["a"], targets["a"]), "b": mse_loss(found["b"], targets["b"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [self.trunk, self.heads["a"], self.heads["b"]]
        return torch.optim.SGD([{"params": group.parameters()} for group in groups], lr=1.0)


def test_a_subclass_that_computes_all_losses_needs_no_change(factory: Callable[[], pl.Trainer]) -> None:
    alone = single_task_baselines(small(cls=Indexes), quiet_data(), factory)
    for task in alone.tasks:
        assert alone.scores[0][task]["loss"] == pytest.approx(plain_loss_of(task), rel=1e-5)


def test_only_the_chosen_tasks_train() -> None:
    module = small(["a", "b", "c"])
    fit(module, loader(batch(tasks="abc")))  # what a fit leaves behind stays out of the copy
    copy = only_tasks(module, ["a", "c"])
    before = {name: value.clone() for name, value in copy.state_dict().items()}
    trainer = fit(copy, loader(batch(tasks="abc")), loader(batch(tasks="abc")), callbacks=[MGDA()])
    assert copy.state_dict()["heads.b.weight"].equal(before["heads.b.weight"])
    for name in ("trunk.0.weight", "heads.a.weight", "heads.c.weight"):
        assert not copy.state_dict()[name].equal(before[name])
        assert module.state_dict()[name].equal(before[name])
    assert list(task_scores(trainer)) == ["a", "c"]
    assert not any(name.endswith("/b") for name in trainer.callback_metrics)
    assert module.learned_tasks is None
    assert only_tasks(copy, ["a", "b", "c"]).learned_tasks is None


def test_a_trunk_with_batch_normalization_sees_its_task_s_inputs_alone() -> None:
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module = MultiTaskModule(trunk, {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, regressions())
    (x, targets), (other, _) = batches(4, 5)
    copy = only_tasks(module, ["a"])
    with torch.no_grad():
        expected = 0.1 * trunk[0](x).mean(0)
    fit(copy, loader({"a": (x, targets["a"]), "b": (1000 + other, torch.zeros(5, 1))}))
    norm = copy.trunk[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, expected)


def numpy_state() -> str:
    return str(np.random.get_state(legacy=False))  # noqa: NPY002 - the global one


def test_seeds_decide_weights_and_order_and_nothing_outside_changes(factory: Callable[[], pl.Trainer]) -> None:
    def module(seed: int) -> MultiTaskModule:
        made = MultiTaskModule(
            nn.Linear(3, 4),
            {task: nn.Linear(4, 1) for task in "ab"},
            regressions(),
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        )
        weights.append(flat_parameters(made))
        return made

    weights: list[Tensor] = []
    inputs, targets = batch(8)
    data: Any = StackDataset(inputs, StackDataset(**targets))  # type: ignore[arg-type]
    pair = DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=8)
    outside = torch.get_rng_state(), random.getstate(), numpy_state()
    first = single_task_baselines(module, pair, factory, seeds=(0, 1))
    assert torch.get_rng_state().equal(outside[0])
    assert random.getstate() == outside[1]
    assert numpy_state() == outside[2]
    again = single_task_baselines(module, lambda seed: pair, factory, seeds=(1, 0))
    assert first.scores[0] == again.scores[1] != first.scores[1]
    assert first.scores[1] == again.scores[0]
    assert weights[0].equal(weights[3])
    assert not weights[0].equal(weights[1])
    # A multi-task run, and one of a single task, under the same seed begin and go on with the same.
    single = train_and_score(module, pair, factory, tasks=["a"], seed=1)
    assert single["a"]["loss"] == first.scores[1]["a"]["loss"]
    together = train_and_score(module, pair, factory, seed=1)
    assert set(together) == {"a", "b"}
    assert together["a"] != single["a"]


def test_metrics_are_those_that_say_which_way_is_better(factory: Callable[[], pl.Trainer]) -> None:
    module = binary()
    alone = single_task_baselines(module, quiet_data(), factory)
    assert alone.higher_is_better == {task: {"accuracy": True, "error": False} for task in "ab"}
    scored = single_task_baselines(module, quiet_data(), factory, tasks=["b"], metrics=["loss", "error"])
    assert scored.higher_is_better == {"b": {"loss": False, "error": False}}
    assert scored.scores[0]["b"]["error"] == alone.scores[0]["b"]["error"]
    assert module.tasks["b"].baseline == scored.scores[0]["b"]
    assert module.tasks["a"].baseline == alone.scores[0]["a"]


def test_scores_may_be_those_of_the_test_data_and_of_the_best_checkpoint(tmp_path: Path) -> None:
    def trainer() -> pl.Trainer:
        folders.append(tmp_path / str(len(folders)))
        best = pl.callbacks.ModelCheckpoint(folders[-1], monitor="val/loss/total", mode="max")
        return quiet_trainer(max_epochs=4, callbacks=[best], enable_checkpointing=True)

    folders: list[Path] = []

    def first_epochs() -> pl.Trainer:
        return quiet_trainer(max_epochs=1)

    module = small(optimizer=functools.partial(torch.optim.SGD, lr=1e-3))  # each epoch is better than the last
    chosen = single_task_baselines(module, Data(), trainer, stage="test", ckpt_path="best")
    assert chosen.scores == single_task_baselines(module, Data(), first_epochs, stage="test").scores
    assert chosen.scores != single_task_baselines(module, Data(), first_epochs).scores


# What is refused


def test_arguments_are_refused_before_anything_trains(factory: Callable[[], pl.Trainer]) -> None:
    used = quiet_trainer()
    used.fit(small(), *quiet_data())
    for arguments, message in (
        ({"cache_dir": "somewhere"}, "cache_dir='somewhere' and key=None go together"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must be one or more, each once"),
        ({"tasks": ["c"]}, r"tasks=\['c'\] must be among \['a', 'b'\]"),
        ({"metrics": ["accuracy"]}, "metrics=.'accuracy'. has none of task 'a'"),
        ({"trainer_factory": lambda: used}, "a Trainer that has run before"),
    ):
        given: dict[str, Any] = {"trainer_factory": factory} | dict(arguments)
        with pytest.raises(ValueError, match=message):
            single_task_baselines(small(), quiet_data(), **given)
    with pytest.raises(TypeError, match=r"datamodule must be .* found list"):
        single_task_baselines(small(), [1], factory)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must return a lightning\.pytorch\.Trainer, found int"):
        single_task_baselines(small(), quiet_data(), lambda: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"one task or more among \['a', 'b'\]; found 'a'"):
        only_tasks(small(), "a")
    assert Counted.fits == 0


def test_scores_that_are_not_there_are_asked_for() -> None:
    trainer = fit(small(), quiet_data()[0])
    with pytest.raises(ValueError, match=r"no val scores: call trainer\.validate"):
        task_scores(trainer)
    with pytest.raises(ValueError, match=r"no score for loss of b, only \{'a': \['loss'\], 'b': \[\]\}"):
        SingleTaskBaselines((0,), ({"a": {"loss": 1.0}, "b": {}},), {"a": {"loss": False}, "b": {"loss": False}})
    with pytest.raises(ValueError, match="found 1 for 2 seeds"):
        SingleTaskBaselines((0, 1), ({"a": {"loss": 1.0}},), {"a": {"loss": False}})


def test_a_baseline_of_zero_is_left_out_of_the_task_with_a_warning() -> None:
    module = small(["a"])
    alone = SingleTaskBaselines((0,), ({"a": {"loss": 0.0}},), {"a": {"loss": False}})
    with pytest.warns(UserWarning, match="baseline of task 'a' for 'loss' is 0"):
        alone.fill(module)
    assert module.tasks["a"].baseline == {}
    assert Task(mse_loss, baseline=module.tasks["a"].baseline).baseline == {}
