"""Who stops when, what of it is logged and resumed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging

from lightning_mtl import MultiTaskModule
from lightning_mtl.control import TaskEarlyStopping
from lightning_mtl.weighting import UncertaintyWeighting
from tests.control.stopped import TASKS, TRAIN, VAL, adam, after_two, head_of, scripted
from tests.small import batches, small
from tests.training import Memory, fit, flat_parameters, loader, quiet_trainer

# Who stops when


def stops(script: dict[str, list[float]], **arguments: Any) -> tuple[list[tuple[set[str], set[str]]], int]:
    """Who rests after each validation, and how many epochs there were."""
    module = scripted(script)
    resting: list[tuple[set[str], set[str]]] = []
    trainer_arguments = {name: arguments.pop(name) for name in ("min_epochs",) if name in arguments}
    stopping = TaskEarlyStopping("loss", **arguments)

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            resting.append((set(stopping.resting.dropped), set(stopping.resting.head_only)))

    epochs = max(map(len, script.values()))
    given = batches(2, tasks=script)
    callbacks = [stopping, Watch()]
    trainer = fit(
        module,
        loader(*given),
        loader(*given),
        callbacks=callbacks,
        max_epochs=epochs,
        **trainer_arguments,
    )
    return resting, trainer.current_epoch


NOBODY: tuple[set[str], set[str]] = (set(), set())


def test_patience_counts_validations_without_improvement() -> None:
    script = {"a": [5.0, 4.0, 4.0, 3.9, 4.5, 4.4], "b": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]}
    resting, epochs = stops(script, patience=2)
    assert resting == [NOBODY] * 5 + [({"a"}, set())]
    assert epochs == 6


def test_improvements_have_to_exceed_min_delta_from_the_best_score() -> None:
    script = {"a": [5.0, 4.8, 4.6, 4.4, 4.4], "b": [9.0, 8.0, 7.0, 6.0, 5.0]}
    resting, _ = stops(script, patience=2, min_delta={"a": 0.5}, then={"a": "head_only"})
    assert resting == [NOBODY, NOBODY, (set(), {"a"}), (set(), {"a"}), (set(), {"a"})]


def test_a_task_comes_back_with_regret_and_stops_again() -> None:
    script = {"a": [5.0, 5.0, 5.4, 5.6, 5.5, 5.0], "b": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]}
    resting, _ = stops(script, patience=1, regret={"a": 0.5})
    assert [dropped == {"a"} for dropped, _ in resting] == [False, True, True, False, True, True]


def test_a_score_that_is_not_a_number_is_no_improvement() -> None:
    script = {"a": [5.0, torch.nan, torch.nan, 1.0], "b": [9.0, 8.0, 7.0, 6.0]}
    assert stops(script, patience=2)[0] == [NOBODY, NOBODY, ({"a"}, set()), ({"a"}, set())]


def test_a_validation_without_samples_of_a_task_does_not_count() -> None:
    module = scripted({"a": [5.0, 5.0], "b": [9.0]})
    given = batches(2)
    stopping = TaskEarlyStopping("loss", patience=1)
    fit(module, loader(*given), loader(*given), callbacks=[stopping], max_epochs=2)
    assert stopping.done == ["a"]


def test_the_fit_ends_when_all_tasks_are_done() -> None:
    assert stops({"a": [5.0] * 9, "b": [4.0, 3.0] + [3.0] * 7}, patience=1)[1] == 3


def test_the_fit_ends_when_the_chosen_task_is_done() -> None:
    script = {"a": [5.0] * 9, "b": [4.0, 3.0, 2.0] + [2.0] * 6, "c": [9.0 - epoch for epoch in range(9)]}
    assert stops(script, patience=1, until="b")[1] == 4
    assert stops(script, patience=1, until=["a", "c"])[1] == 9


def test_tasks_that_nobody_watches_train_on() -> None:
    module, given = small(), batches(2)
    stopping = TaskEarlyStopping({"a": "loss"}, patience=1, min_delta=1e6)
    trainer = fit(module, loader(*given), loader(*given), callbacks=[stopping], max_epochs=4)
    assert trainer.current_epoch == 4
    assert stopping.done == ["a"]


def test_the_last_tasks_train_on_until_the_trainer_may_end() -> None:
    resting, epochs = stops({"a": [5.0] * 6, "b": [4.0, 3.0] + [3.0] * 4}, patience=1, min_epochs=5)
    assert resting == [NOBODY, *[({"a"}, set())] * 4]
    assert epochs == 5


# Logged, saved, refused


def test_who_trains_is_logged_once_an_epoch() -> None:
    logger, given = Memory(), batches(2, tasks=TASKS)
    fit(small(TASKS), loader(*given), loader(*given), callbacks=[after_two()], max_epochs=3, logger=logger)
    lines = [line for _, line in logger.lines if "active/b" in line]
    assert [[line[f"active/{task}"] for task in TASKS] for line in lines] == [[1, 1, 1], [1, 0, 1], [1, 0, 1]]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("then", ["drop", "head_only"])
@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_fit_is_the_same_to_the_bit(then: Any, epoch: int, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> tuple[MultiTaskModule, TaskEarlyStopping]:
        module, stopping = small(TASKS, optimizer=adam), after_two(then=then, patience={"b": 1, "a": 3, "c": 3})
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [UncertaintyWeighting(lr=0.1), stopping, saving]
        fit(
            module,
            loader(*TRAIN),
            loader(*VAL),
            callbacks=callbacks,
            max_epochs=9,
            enable_checkpointing=True,
            ckpt_path=resume,
        )
        return module, stopping

    module, stopping = run()
    again, resumed = run(str(tmp_path / f"epoch={epoch}.ckpt"))
    assert torch.equal(flat_parameters(module), flat_parameters(again))
    assert stopping.state_dict() == resumed.state_dict()
    assert stopping.done == ["a", "b", "c"]
    finished, _ = run(str(tmp_path / "epoch=3.ckpt"))  # the last one: nothing is left to train
    assert torch.equal(flat_parameters(module), flat_parameters(finished))


def test_a_second_fit_begins_with_all_tasks() -> None:
    stopping, given = after_two(), batches(2, tasks=TASKS)
    for _ in range(2):
        fit(small(TASKS), loader(*given), loader(*given), callbacks=[stopping], max_epochs=2)
        assert stopping.done == ["b"]
    fit(small(TASKS), loader(*given), loader(*given), callbacks=[stopping], max_epochs=1)
    assert stopping.done == []


def test_averaged_weights_and_stopped_tasks_go_together() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    module, given = small(TASKS), batches(4, tasks=TASKS)
    before = head_of(module, "b")
    fit(module, loader(*given), loader(*given), callbacks=[after_two(), averaging], max_epochs=4)
    assert not torch.equal(before[0], head_of(module, "b")[0])
    assert flat_parameters(module).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": {}}, "a metric's name, or {task: name}"),
        ({"patience": 0}, r"patience=0\) must be at least 1"),
        ({"patience": {"a": 0}}, r"patience={'a': 0}\) must be at least 1"),
        ({"min_delta": -1.0}, "at least 0 and finite"),
        ({"regret": torch.inf}, "at least 0 and finite"),
        ({"mode": "best"}, r"mode='best'\) must be 'min' or 'max'"),
        ({"then": "stop"}, r"then='stop'\) must be 'drop' or 'head_only'"),
        ({"until": []}, "names no task"),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskEarlyStopping(**({"metrics": "loss"} | arguments))


def test_a_count_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"patience=1.5\) must be an int"):
        TaskEarlyStopping("loss", patience=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": {"z": "loss"}}, r"names \['z'\], but the tasks are \['a', 'b'\]"),
        ({"metrics": "accuracy"}, r"'accuracy' of task 'a', whose metrics are \['loss'\]"),
        ({"patience": {"z": 1}}, r"patience=...\) names \['z'\]"),
        ({"until": "z"}, r"until=...\) names \['z'\]"),
        ({"metrics": {"a": "loss"}, "until": "b"}, r"waits for \['b'\], which no metric is followed of"),
        ({"mode": "max"}, "says that lower is better"),
    ],
)
def test_names_are_refused_at_setup(arguments: dict[str, Any], message: str) -> None:
    given = batches(2)
    with pytest.raises(ValueError, match=message):
        fit(small(), loader(*given), loader(*given), callbacks=[TaskEarlyStopping(**({"metrics": "loss"} | arguments))])


def test_a_fit_without_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="the Trainer has no validation loader"):
        fit(small(), loader(*batches(2)), callbacks=[TaskEarlyStopping("loss")])


def test_a_task_without_validation_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tasks \['b'\], of which the first validation had no sample"):
        fit(small(), loader(*batches(2)), loader(*batches(2, tasks=["a"])), callbacks=[TaskEarlyStopping("loss")])


def test_two_of_them_are_refused() -> None:
    stoppings = [TaskEarlyStopping({"a": "loss"}), TaskEarlyStopping({"b": "loss"}, then="head_only")]
    trainer, given = quiet_trainer(), batches(2)
    trainer.callbacks += stoppings  # type: ignore[attr-defined]  # Lightning's own check of state keys comes earlier
    with pytest.raises(ValueError, match="more than one TaskEarlyStopping"):
        trainer.fit(small(), loader(*given), loader(*given))
