"""What is logged, under which names, when, and to whom."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.finetuning import add_task
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import DWA, MGDA, GradNorm, StaticWeights, UncertaintyWeighting
from tests.gradients.oracle import task_gradients
from tests.models import build
from tests.small import TASKS, batch, batches, binary, heads, small, trunk
from tests.training import Memory, Steps, fit, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 0.5, "b": 2.0}
STEP_NAMES = {f"{name}/{task}" for name in ("loss", "weight") for task in TASKS}
NORMS = {f"grad_norm/{task}" for task in TASKS}


def with_baselines() -> MultiTaskModule:
    module = binary()
    tasks = {k: Task(task.loss, task.metrics, {"accuracy": 0.9}) for k, task in module.tasks.items()}
    return MultiTaskModule(module.trunk, dict(module.heads.items()), tasks)


@pytest.mark.parametrize(
    ("weighting", "names"),
    [
        (None, STEP_NAMES),
        (UncertaintyWeighting(), STEP_NAMES),
        (GradNorm(), STEP_NAMES | NORMS),
        (MGDA(), STEP_NAMES | NORMS),
        (MGDA(at="features"), STEP_NAMES | NORMS),
        (WeightedSum(WEIGHTS), {"loss/a", "loss/b"} | NORMS),
    ],
    ids=["none", "losses", "layer", "trunk", "features", "aggregator"],
)
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_the_fixed_names(weighting: Any, names: set[str], log_every_n_steps: int) -> None:
    callbacks = [] if weighting is None else [weighting]
    data = loader(*batches(4, 4, 4)), loader(batch())
    trainer = fit(with_baselines(), *data, callbacks=callbacks, log_every_n_steps=log_every_n_steps)
    found = set(trainer.callback_metrics)
    epoch = {f"{name}/{task}" for name in ("loss_epoch", "val/loss", "val/accuracy", "val/error") for task in TASKS}
    assert names | epoch | {"val/delta_m", "val/loss/total", "loss/total"} <= found
    assert {name for name in found if name.split("/")[0] in ("loss", "weight", "grad_norm")} == names | {"loss/total"}


def test_the_last_step_is_in_the_metrics_however_rarely_steps_are_logged() -> None:
    steps = Steps()
    trainer = fit(small(), loader(*batches(4, 4, 4)), callbacks=[steps, GradNorm()], log_every_n_steps=50)
    for position, task in enumerate(TASKS):
        assert float(trainer.callback_metrics[f"loss/{task}"]) == pytest.approx(
            float(steps.signals[-1].losses[position])
        )


@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_are_logged_at_the_trainers_interval(every: int) -> None:
    memory, steps = Memory(), Steps()
    module = small(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    given = batches(4, 3, 4, 2, 4)
    callbacks = [steps, fixed(WEIGHTS, "norms", at="last_layer")]
    fit(module, loader(*given), callbacks=callbacks, logger=memory, log_every_n_steps=every)
    lines = {step: line for step, line in memory.lines if "loss_epoch/a" not in line}
    assert sorted(lines) == sorted({*range(every - 1, 5, every), 4})  # the epoch's last step, too
    for step, line in lines.items():
        signals, weights = steps.signals[step], steps.weights[step]
        assert signals.norms is not None
        assert weights is not None
        for position, task in enumerate(TASKS):
            assert line[f"loss/{task}"] == pytest.approx(float(signals.losses[position]))
            assert line[f"weight/{task}"] == pytest.approx(float(weights[position]))
            assert line[f"grad_norm/{task}"] == pytest.approx(float(signals.norms[position]))
        assert line["loss/total"] == pytest.approx(float((signals.losses * weights).sum()), rel=1e-5)


def test_with_accumulation_a_step_is_a_window() -> None:
    memory, steps = Memory(), Steps()
    fit(
        small(accumulate_grad_batches=2),
        loader(*batches(4, 4, 4, 4)),
        callbacks=[steps],
        logger=memory,
        log_every_n_steps=2,
    )
    lines = [line for _, line in memory.lines if "loss_epoch/a" not in line]
    assert [line["loss/a"] for line in lines] == pytest.approx([float(s.losses[0]) for s in steps.signals])


def test_a_step_logs_only_what_it_measured() -> None:
    memory, (inputs, targets) = Memory(), batch()
    turns = [(inputs, {"a": targets["a"]}), (inputs, {"b": targets["b"]}), (inputs, targets)]
    fit(small(), loader(*turns), callbacks=[GradNorm()], logger=memory, log_every_n_steps=1)
    lines = [line for _, line in memory.lines if "loss_epoch/a" not in line]
    assert [{name for name in line if name.startswith("loss/")} - {"loss/total"} for line in lines] == [
        {"loss/a"},
        {"loss/b"},
        {"loss/a", "loss/b"},
    ]
    memory = Memory()
    fit(small(), loader(*[batch()] * 4), callbacks=[MGDA(every_n_steps=2)], logger=memory, log_every_n_steps=1)
    lines = [line for _, line in memory.lines if "loss_epoch/a" not in line]
    assert ["grad_norm/a" in line for line in lines] == [True, False, True, False]


@pytest.mark.parametrize("at", ["losses", "trunk", "features", "last_layer"])
@pytest.mark.parametrize("weighs_heads", [True, False])
def test_the_logged_weight_is_what_multiplied_the_shared_gradient(at: str, weighs_heads: bool) -> None:
    case = build("mlp", 3, seed=21)
    gradients = task_gradients(case.module, case.batch)
    before = {name: p.detach().clone() for name, p in case.module.trunk.named_parameters()}
    given = {"task0": 0.3, "task1": 1.7, "task2": -0.4}
    weighting = (
        fixed(given, "losses", importance={"task1": 2.0})
        if at == "losses"
        else fixed(given, "norms", at=at, weighs_heads=weighs_heads, importance={"task1": 2.0})
    )
    trainer = fit(case.module, loader(case.batch), callbacks=[weighting])
    logged = {task: float(trainer.callback_metrics[f"weight/{task}"]) for task in case.tasks}
    assert logged == pytest.approx({"task0": 0.3, "task1": 3.4, "task2": -0.4})
    for name, parameter in case.module.trunk.named_parameters():
        moved = before[name] - parameter.detach()
        expected = torch.zeros_like(moved)
        for task, weight in logged.items():
            gradient = gradients[task][f"trunk.{name}"]
            assert gradient is not None
            expected += weight * gradient
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["loss/a", "weight/b", "grad_norm/a", "loss_epoch/a", "val/loss/b", "val/accuracy/a", "val/delta_m"]
)
def test_every_name_can_be_monitored(name: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor=name, filename="best")
    stopping = EarlyStopping(monitor=name, min_delta=1e9, patience=0, check_on_train_epoch_end=True)
    trainer = fit(
        with_baselines(),
        loader(*batches(4, 4)),
        loader(batch()),
        callbacks=[GradNorm(), checkpoint, stopping],
        enable_checkpointing=True,
        max_epochs=5,
    )
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.isfinite()
    assert trainer.current_epoch == 2  # nothing improves by 1e9


def test_csv_gets_the_same_scalars(tmp_path: Path) -> None:
    memory = Memory()
    logger = CSVLogger(tmp_path)
    trainer = fit(
        with_baselines(),
        loader(*batches(4, 4)),
        loader(batch()),
        callbacks=[MGDA()],
        logger=[logger, memory],
        log_every_n_steps=1,
    )
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name, value in row.items() if value}
    assert set(trainer.callback_metrics) <= names
    steps = [row for row in rows if row["loss/a"]]
    expected = [line["loss/a"] for _, line in memory.lines if "loss/a" in line]
    assert [float(row["loss/a"]) for row in steps] == pytest.approx(expected)


def events(tmp_path: Path, module: MultiTaskModule, **arguments: Any) -> EventAccumulator:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    fit(module, loader(*batches(4, 4)), loader(batch()), logger=logger, log_every_n_steps=1, **arguments)
    logger.finalize("success")
    found = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_gets_scalars_and_the_layout_of_charts(tmp_path: Path) -> None:
    found = events(tmp_path, with_baselines(), callbacks=[MGDA()])
    scalars = set(found.Tags()["scalars"])
    wanted = {f"{name}/{task}" for name in ("loss", "weight", "grad_norm", "loss_epoch", "val/loss") for task in TASKS}
    assert wanted | {"val/delta_m"} <= scalars
    assert [event.step for event in found.Scalars("weight/a")] == [0, 1]
    tensor = found.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    for title, prefix in (("weights", "weight/"), ("losses", "loss/"), ("validation losses", "val/loss/")):
        assert drawn(charts[title], scalars) == {f"{prefix}{task}" for task in TASKS}


def drawn(patterns: list[str], tags: set[str]) -> set[str]:
    """The tags that a chart shows, as TensorBoard matches them."""
    return {tag for pattern in patterns for tag in tags if re.match(pattern, tag)}


def test_names_with_spaces_and_signs() -> None:
    names = ("left eye", "c+d")
    module = small(names)
    module_batch = batch(4, 5, names)
    trainer = fit(module, loader(module_batch), loader(module_batch), callbacks=[StaticWeights()])
    assert {f"val/loss/{name}" for name in names} | {f"weight/{name}" for name in names} <= set(
        trainer.callback_metrics
    )


def test_every_epochs_means_are_its_own() -> None:
    memory, data = Memory(), loader(*batches(4, 2))
    fit(small(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), data, data, max_epochs=3, logger=memory)
    for name in ("loss_epoch/a", "val/loss/b"):
        found = [line[name] for _, line in memory.lines if name in line]
        assert found == pytest.approx(3 * [found[0]])


def test_penalties_are_logged_as_they_are() -> None:
    class Penalized(MultiTaskModule):
        def penalties(self) -> dict[str, Tensor]:
            return {"l2": 3 + 0 * next(self.trunk.parameters()).sum()}

    memory = Memory()
    fit(small(cls=Penalized), loader(batch()), callbacks=[DWA()], logger=memory, log_every_n_steps=1)
    assert memory.lines[0][1]["penalty/l2"] == 3.0


def test_a_module_without_metrics_logs_none() -> None:
    module = MultiTaskModule(trunk(), heads(), small().tasks)
    names = set(fit(module, loader(batch()), loader(batch())).callback_metrics)
    assert {name for name in names if name.startswith("val/")} == {"val/loss/total", "val/loss/a", "val/loss/b"}


def test_no_name_lies_under_another() -> None:
    class Penalized(MultiTaskModule):
        def penalties(self) -> dict[str, Tensor]:
            return {"l2": 0 * next(self.trunk.parameters()).sum()}

    names = ("a", "b/left", "b/right")
    tasks = {k: Task(mse_loss, MeanAbsoluteError(), {"loss": 0.1}, missing=torch.nan) for k in names}
    module = Penalized(trunk(), heads(names), tasks)
    memory, data = Memory(), loader(*batches(4, 4, tasks=names))
    callbacks = [GradNorm(), TaskLearningRate(Importance(dict.fromkeys(names, 1.0)))]
    trainer = fit(module, data, data, callbacks=callbacks, logger=memory, log_every_n_steps=1)
    shown = dict(trainer.progress_bar_metrics)
    trainer.test(module, data, verbose=False)
    found = {name for _, line in memory.lines for name in line}
    families = ("loss", "weight", "grad_norm", "lr", "loss_epoch", "labeled", "val/loss", "test/MeanAbsoluteError")
    assert {f"{family}/{task}" for family in families for task in names} <= found
    assert {"loss/total", "val/loss/total", "test/loss/total", "val/delta_m", "penalty/l2"} <= found
    assert [(one, other) for one in found for other in found if other.startswith(f"{one}/")] == []
    totals = [line["loss/total"] for _, line in memory.lines if "loss/total" in line]
    assert shown == {"loss/total": pytest.approx(totals[-1])}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a", "total"), "'total' cannot name a task: 'loss/total' is where.*'total_task' would do"),
        (("a", "total/left"), "'total/left' cannot name a task"),
        (("a", "a/b"), "'a/b' begins with the name of task 'a' and a slash"),
    ],
)
def test_names_that_would_lie_under_others_are_refused(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(names)
    module = small(names[:1])
    with pytest.raises(ValueError, match=says):
        add_task(module, names[1], torch.nn.Linear(4, 1), Task(mse_loss))
