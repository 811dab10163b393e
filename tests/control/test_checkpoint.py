"""Each task's best epoch and the best compromise, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.control import TaskCheckpoint
from tests.control.stopped import scripted
from tests.control.worker import keep
from tests.distributed.pairs import Pair
from tests.small import batches, heads, small, trunk
from tests.training import fit, flat_parameters, loader, quiet_trainer

# Losses: a is best in epoch 2, b in epoch 1, c in epoch 4; epoch 3 is second for all three.
SCRIPT = {"a": [9.0, 8.0, 1.0, 2.0, 7.0], "b": [9.0, 1.0, 8.0, 2.0, 3.0], "c": [9.0, 8.0, 7.0, 2.0, 1.0]}


class Parameters(Callback):
    """Keeps the parameters of each validation."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.kept.append(flat_parameters(pl_module))


def run(
    checkpoint: TaskCheckpoint,
    *others: Callback,
    script: Mapping[str, Sequence[float]] = SCRIPT,
    module: MultiTaskModule | None = None,
    epochs: int = 5,
    **arguments: Any,
) -> Any:
    given = batches(4, 4, tasks=script)
    return fit(
        scripted(script) if module is None else module,
        loader(*given),
        loader(*given),
        callbacks=[*others, checkpoint],
        max_epochs=epochs,
        enable_checkpointing=True,
        **arguments,
    )


def parameters_in(path: str | None, module: MultiTaskModule | None = None) -> Tensor:
    assert path is not None
    module = scripted(SCRIPT) if module is None else module
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return flat_parameters(module)


def test_files_hold_the_parameters_of_each_tasks_best_epoch_and_of_the_compromise(tmp_path: Path) -> None:
    checkpoint, seen = TaskCheckpoint("loss", dirpath=tmp_path), Parameters()
    run(checkpoint, seen)
    for task, epoch in (("a", 2), ("b", 1), ("c", 4)):
        path = checkpoint.best_path(task)
        assert path == str(tmp_path / f"tasks-epoch={epoch}-step={2 * epoch + 2}.ckpt")
        torch.testing.assert_close(parameters_in(path), seen.kept[epoch], rtol=0, atol=0)
    torch.testing.assert_close(parameters_in(checkpoint.compromise_path), seen.kept[3], rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"tasks-epoch={epoch}-step={2 * epoch + 2}.ckpt" for epoch in (1, 2, 3, 4)
    ]


def test_one_file_serves_several_tasks_and_old_ones_are_removed(tmp_path: Path) -> None:
    checkpoint = TaskCheckpoint("loss", dirpath=tmp_path)
    run(checkpoint, script={"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0]}, epochs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["tasks-epoch=2-step=6.ckpt"]
    assert checkpoint.best_path("a") == checkpoint.best_path("b") == checkpoint.compromise_path


def test_the_table_says_what_the_compromise_loses(tmp_path: Path) -> None:
    checkpoint = TaskCheckpoint("loss", dirpath=tmp_path)
    run(checkpoint)
    assert checkpoint.table().text().splitlines() == [
        "task  metric  best  epoch  compromise, epoch 3  lost",
        "a     loss       1      2                    2     1",
        "b     loss       1      1                    2     1",
        "c     loss       1      4                    2     1",
    ]


def test_the_compromise_of_a_function_and_none(tmp_path: Path) -> None:
    mine = TaskCheckpoint("loss", compromise=lambda scores: -scores["b"]["loss"], dirpath=tmp_path / "mine")
    run(mine)
    assert mine.compromise_path == mine.best_path("b")
    none = TaskCheckpoint("loss", compromise=None, dirpath=tmp_path / "none")
    run(none)
    assert none.compromise_path is None
    assert len(list((tmp_path / "none").iterdir())) == 3


def test_the_compromise_of_delta_m(tmp_path: Path) -> None:
    tasks = {task: Task(torch.nn.functional.mse_loss, baseline={"loss": 0.25}) for task in ("a", "b")}
    module = MultiTaskModule(trunk(), heads(), tasks)
    changes: list[float] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            changes.append(float(trainer.callback_metrics["val/delta_m"]))

    checkpoint = TaskCheckpoint("loss", compromise="delta_m", dirpath=tmp_path)
    run(checkpoint, Watch(), module=module, script={"a": [], "b": []})
    epoch = min(range(5), key=changes.__getitem__)
    assert checkpoint.compromise_path == str(tmp_path / f"tasks-epoch={epoch}-step={2 * epoch + 2}.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("ours_first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_beside_lightnings_checkpoints_and_resumed_from_them(ours_first: bool, tmp_path: Path) -> None:
    def fitted(resume: str | None = None) -> TaskCheckpoint:
        lightnings = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        ours = TaskCheckpoint("loss")
        given = batches(4, 4, tasks=SCRIPT)
        callbacks = [ours, lightnings] if ours_first else [lightnings, ours]
        settings = {"max_epochs": 5, "enable_checkpointing": True, "ckpt_path": resume}
        fit(scripted(SCRIPT), loader(*given), loader(*given), callbacks=callbacks, **settings)
        return ours

    whole = fitted()
    assert Path(str(whole.compromise_path)).parent == tmp_path
    files = {path.name for path in tmp_path.glob("tasks-*")}
    resumed = fitted(str(tmp_path / "epoch=2.ckpt"))
    assert resumed.state_dict() == whole.state_dict()
    assert {path.name for path in tmp_path.glob("tasks-*")} == files


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_says_which_files_are_gone(tmp_path: Path) -> None:
    script = {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0]}
    run(TaskCheckpoint("loss"), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), script=script, epochs=3)
    again = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match=r"resumes, but .*tasks-epoch=1-step=4.ckpt'\] are not there"):
        run(TaskCheckpoint("loss"), again, script=script, epochs=3, ckpt_path=str(tmp_path / "epoch=1.ckpt"))


@pytest.mark.slow
def test_a_second_fit_leaves_the_first_ones_files(tmp_path: Path) -> None:
    checkpoint = TaskCheckpoint("loss", dirpath=tmp_path)
    run(checkpoint, epochs=1)
    run(checkpoint, epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"tasks-epoch=0-step=2.ckpt", "tasks-v1-epoch=0-step=2.ckpt"}


def test_lightnings_best_is_the_compromise(tmp_path: Path) -> None:
    checkpoint, seen, module = TaskCheckpoint("loss", dirpath=tmp_path), Parameters(), scripted(SCRIPT)
    trainer = run(checkpoint, seen, module=module)
    trainer.validate(module, loader(*batches(4, tasks=SCRIPT)), ckpt_path="best", verbose=False)
    assert torch.equal(flat_parameters(module), seen.kept[3])


@pytest.mark.slow
def test_two_processes_keep_the_same(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.run(keep, str(tmp_path))
    assert first == second
    kept = {first["compromise"], *first["best"].values()}
    paths = [first["epochs"][position]["path"] for position in sorted(kept)]
    assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)


def refused(module: MultiTaskModule | None = None, val: Any = True, **arguments: Any) -> None:
    given = batches(2)
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[TaskCheckpoint(**({"metrics": "loss"} | arguments))])
    trainer.fit(small() if module is None else module, loader(*given), loader(*given) if val else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ""}, "a metric's name, or {task: name}"),
        ({"compromise": "best"}, "must be 'mean_rank', 'delta_m', a function or None"),
        ({"compromise": "delta_m"}, "compares with baselines, and no task has one"),
        ({"metrics": "accuracy"}, r"'accuracy' of task 'a', whose metrics are \['loss'\]"),
        ({"metrics": {"z": "loss"}}, r"names \['z'\]"),
        ({"mode": {"a": "max"}}, "says that lower is better"),
        ({"mode": "high"}, r"mode='high'\) must be"),
        ({"val": False}, "has no validation loader"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**arguments)


def test_unknown_tasks_and_early_tables_are_refused(tmp_path: Path) -> None:
    checkpoint = TaskCheckpoint({"a": "loss"}, dirpath=tmp_path)
    with pytest.raises(ValueError, match="There is no compromise yet"):
        checkpoint.table()
    run(checkpoint, epochs=1)
    with pytest.raises(ValueError, match=r"follows \['a'\], and not 'b'"):
        checkpoint.best_path("b")
