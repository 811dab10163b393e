"""Shares that follow validation: against the definition, and the same again after a resume and on two ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import mse_loss
from torchmetrics import MeanSquaredError, MetricCollection, R2Score

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.data import Adaptive, MultiTaskDataModule, RoundRobin, Schedule
from lightning_mtl.data.adaptive import shares_of
from tests.control.adapting import TASKS, Watch, adapted, data, dataset, module
from tests.distributed.pairs import Pair
from tests.small import heads, trunk
from tests.training import Memory, flat_parameters, quiet_trainer

EQUAL = pytest.approx(dict.fromkeys(TASKS, 1 / 3))


def train(mixing: Any, model: MultiTaskModule | None = None, **arguments: Any) -> Watch:
    watch, resume = Watch(), arguments.pop("ckpt_path", None)
    callbacks = [watch, *arguments.pop("callbacks", [])]
    of_data = {name: arguments.pop(name) for name in ("steps_per_epoch",) if name in arguments}
    trainer = quiet_trainer(callbacks=callbacks, **({"max_epochs": 4} | arguments))
    trainer.fit(module() if model is None else model, datamodule=data(mixing, **of_data), ckpt_path=resume)
    return watch


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.05, 0.2])
def test_shares_are_proportional_above_the_floor(temperature: float, floor: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        gaps = dict(zip("abcd", random.exponential(size=4) ** 3, strict=True))
        shares = shares_of(gaps, temperature, floor)
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= floor - 1e-9
        powers = {task: gap ** (1 / temperature) for task, gap in gaps.items()}
        ratios = {task: shares[task] / powers[task] for task in gaps}
        free = [ratios[task] for task in gaps if shares[task] > floor + 1e-9]
        np.testing.assert_allclose(free, free[0], rtol=1e-6)
        # Who is at the floor would have less than it in the others' proportion.
        assert all(ratios[task] >= free[0] * (1 - 1e-6) for task in gaps)


def test_shares_are_the_same_where_there_is_no_gap_or_all_is_floor() -> None:
    assert shares_of({"a": 0.0, "b": 0.0}, 1.0, 0.1) == {"a": 0.5, "b": 0.5}
    assert shares_of({"a": 3.0, "b": 1.0}, 1.0, 0.5) == {"a": 0.5, "b": 0.5}
    assert shares_of({"a": 3.0, "b": 1.0, "c": torch.nan}, 1.0, 0.0) == pytest.approx(
        {"a": 0.5, "b": 1 / 6, "c": 1 / 3}
    )


def by_hand(scores: dict[str, dict[str, float]], goal: float) -> dict[str, float]:
    gaps = {task: max(0.0, goal - scores[task]["accuracy"]) / goal for task in TASKS}
    return {task: gap / sum(gaps.values()) for task, gap in gaps.items()}


@pytest.mark.parametrize("baseline", [pytest.param(None, marks=pytest.mark.slow), 0.95])
def test_each_epochs_shares_are_those_of_the_validation_before(baseline: float | None) -> None:
    model = module(None if baseline is None else {"accuracy": baseline})
    watch = train(Adaptive("accuracy", floor=0.0), model, num_sanity_val_steps=2, steps_per_epoch=60, max_epochs=3)
    assert watch.shares[0] is None
    assert Counter(watch.tasks[0]) == dict.fromkeys(TASKS, 20)
    for scores, shares, tasks in zip(watch.scores, watch.shares[1:], watch.tasks[1:], strict=False):
        assert shares is not None
        assert shares == pytest.approx(by_hand(scores, 1.0 if baseline is None else baseline))
        assert shares["b"] > 0.5  # noise is never learned
        for task in TASKS:
            assert abs(tasks.count(task) - 60 * shares[task]) < 1


def test_ratios_of_losses_begin_with_those_of_the_first_validation() -> None:
    watch = train(Adaptive("loss", temperature=2.0, floor=0.0))
    assert watch.shares[1] == EQUAL
    first, third = watch.scores[0], watch.scores[2]
    roots = {task: (third[task]["loss"] / first[task]["loss"]) ** 0.5 for task in TASKS}
    assert watch.shares[3] == pytest.approx({task: root / sum(roots.values()) for task, root in roots.items()})


def test_shares_stay_the_same_until_the_first_validation() -> None:
    watch = train(Adaptive("accuracy"), num_sanity_val_steps=1, check_val_every_n_epoch=2)
    assert watch.shares[0] is watch.shares[1] is None
    assert watch.shares[2] is not None
    assert watch.shares[2] == watch.shares[3] or len(watch.scores) == 2


def test_a_schedule_begins_to_follow() -> None:
    watch = train(Schedule({0: RoundRobin(), 2: Adaptive("accuracy", floor=0.0)}))
    assert watch.shares[:2] == [None, None]
    assert watch.shares[2] == pytest.approx(by_hand(watch.scores[1], 1.0))


@pytest.mark.slow
def test_a_second_fit_of_the_same_model_begins_with_equal_shares() -> None:
    model = module()
    for _ in range(2):
        assert train(Adaptive("accuracy"), model, max_epochs=2).shares[0] is None


def test_shares_are_logged_once_an_epoch() -> None:
    logger = Memory()
    watch = train(Adaptive("accuracy"), logger=logger)
    lines = [{task: line[f"share/{task}"] for task in TASKS} for _, line in logger.lines if "share/a" in line]
    assert lines == [pytest.approx(shares) for shares in watch.shares[1:]]


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("step", [30, *(pytest.param(step, marks=pytest.mark.slow) for step in (40, 50))])
@pytest.mark.parametrize("metric", ["accuracy", pytest.param("loss", marks=pytest.mark.slow)])
def test_a_resumed_fit_takes_the_same_batches(metric: str, step: int, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> tuple[Watch, Any]:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        model, settings = module(), {"callbacks": [saving], "enable_checkpointing": True, "ckpt_path": resume}
        return train(Adaptive(metric), model, **settings), flat_parameters(model)

    whole, parameters = run()
    resumed, again = run(str(tmp_path / f"step={step}.ckpt"))
    assert torch.equal(parameters, again)
    steps = [task for tasks in whole.tasks for task in tasks]
    assert [task for tasks in resumed.tasks for task in tasks] == steps[step:]
    assert resumed.shares[-1] == whole.shares[-1]


@pytest.mark.slow
def test_two_processes_take_the_same_shares_as_one(pair: Pair) -> None:
    shares, tasks, parameters = adapted()
    first, second = pair.run(adapted)
    for found in (first, second):
        assert found[0] == [None, *(pytest.approx(one, abs=1e-6) for one in shares[1:])]
        assert found[1] == tasks
        torch.testing.assert_close(found[2], parameters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": ""}, "a metric's name, or {task: name}"),
        ({"temperature": 0.0}, r"temperature=0.0\) must be above 0"),
        ({"floor": -0.1}, r"floor=-0.1\) must be between 0"),
        ({"floor": 0.4}, r"floor=0.4\) is more than 3 tasks can have"),
        ({"metric": {"a": "accuracy"}}, r"names the tasks \['a'\], the training data has \['a', 'b', 'c'\]"),
    ],
)
def test_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(Adaptive(**({"metric": "accuracy"} | arguments)))


def regression(**metrics: Any) -> MultiTaskModule:
    tasks = {task: Task(mse_loss, MetricCollection(metrics)) for task in TASKS}
    return MultiTaskModule(trunk(), heads(TASKS), tasks)


@pytest.mark.parametrize(
    ("metric", "model", "message"),
    [
        ("f1", module, "'f1' of task 'a'"),
        ("r2", lambda: regression(r2=R2Score()), "R2Score is not known to lie between 0 and 1"),
        (
            {"a": "loss", "b": "accuracy", "c": "accuracy"},
            module,
            r"ratios of losses, which \['a'\] have for lack of a goal",
        ),
    ],
)
def test_metrics_without_a_goal_are_refused_at_setup(metric: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(Adaptive(metric), model())


def test_ratios_of_a_metric_that_is_better_when_lower_need_no_goal() -> None:
    watch = train(Adaptive("error"), regression(error=MeanSquaredError()), max_epochs=3)
    assert watch.shares[1] == EQUAL
    assert watch.shares[2] is not None


def test_a_fit_without_validation_data_is_refused() -> None:
    given = MultiTaskDataModule({task: dataset(task, 8, 0) for task in TASKS}, mixing=Adaptive("accuracy"))
    with pytest.raises(ValueError, match=r"no validation data of \['a', 'b', 'c'\]"):
        quiet_trainer().fit(module(), datamodule=given)
    with pytest.raises(ValueError, match="no validation data of"):
        train(Adaptive("accuracy"), limit_val_batches=0)


def test_a_task_without_validation_data_is_refused() -> None:
    datasets = {task: dataset(task, 8, 0) for task in TASKS}
    given = MultiTaskDataModule(datasets, {"a": datasets["a"]}, mixing=Adaptive("accuracy"))
    with pytest.raises(ValueError, match=r"no validation data of \['b', 'c'\]"):
        quiet_trainer().fit(module(), datamodule=given)
