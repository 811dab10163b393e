"""What a run tells its loggers beside the curves: the method, charts, figures and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # type: ignore[import-untyped]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.monitors.loggers import hyperparameters_of, log_figure, log_text
from lightning_mtl.weighting import DWA, MGDA, GradNorm
from tests.small import batch, binary
from tests.training import Memory, fit, loader


def events(tmp_path: Path, *, val: bool = True, module: Any = None, **arguments: Any) -> EventAccumulator:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    data = loader(batch())
    fit(module or binary(), data, data if val else None, logger=logger, **arguments)
    logger.finalize("success")
    found = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    found.Reload()
    return found


def charts(found: EventAccumulator) -> dict[str, list[str]]:
    tensor = found.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def hparams(found: EventAccumulator, tag: str) -> Any:
    return HParamsPluginData.FromString(found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)


def test_tensorboard_has_the_method_in_hparams_beside_what_the_user_saved(tmp_path: Path) -> None:
    module = binary()
    module.save_hyperparameters({"width": 4})
    found = events(tmp_path, module=module, callbacks=[GradNorm(alpha=0.5, importance={"a": 2.0})])
    session = hparams(found, "session_start_info").session_start_info.hparams
    values = {name: value.string_value or value.number_value for name, value in session.items()}
    assert {"method": "GradNorm", "method_arguments/alpha": 0.5, "width": 4}.items() <= values.items()
    assert values["method_call"] == "GradNorm(alpha=0.5, importance={'a': 2.0})"
    assert values["method_arguments/importance/a"] == 2.0
    columns = {info.name.tag for info in hparams(found, "experiment").experiment.metric_infos}
    assert columns == {
        "val/loss/total",
        *(f"val/{name}/{task}" for name in ("loss", "accuracy", "error") for task in "ab"),
    }
    assert columns <= set(found.Tags()["tensors"])
    assert len(found.Tensors("val/loss/total")) == 1  # no placeholder in the curve
    saved = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert saved["method"] == "GradNorm"
    assert saved["width"] == 4


def test_charts_are_those_that_this_run_fills(tmp_path: Path) -> None:
    validation = ["validation losses", "validation accuracy", "validation error"]
    callbacks = [MGDA(), TaskLearningRate(Importance({"a": 2.0}))]
    full = charts(events(tmp_path / "full", callbacks=callbacks))
    assert [*full] == ["weights", "losses", "gradient norms", "learning rates", "epoch losses", *validation]
    assert full["validation accuracy"] == ["^val/accuracy/(?!total$)"]
    assert [*charts(events(tmp_path / "losses", callbacks=[DWA()]))] == [
        "weights",
        "losses",
        "epoch losses",
        *validation,
    ]
    assert [*charts(events(tmp_path / "equal", val=False))] == ["weights", "losses", "epoch losses"]


def test_other_loggers_get_the_method_as_nested_values() -> None:
    memory = Memory()
    memory.found = {}  # type: ignore[attr-defined]
    memory.log_hyperparams = memory.found.update  # type: ignore[attr-defined, method-assign]
    fit(binary(), loader(batch()), logger=memory, callbacks=[GradNorm()])
    assert memory.found == hyperparameters_of(GradNorm())  # type: ignore[attr-defined]
    assert memory.found["method_arguments"]["min_weight"] == 0.001  # type: ignore[attr-defined]


class Experiment:
    """Notes the calls of the methods that it is given."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in methods:
            setattr(self, name, lambda *given, _name=name, **named: self.calls.append((_name, given, named)))


class Bearer(Logger):
    """A logger around an experiment."""

    name = version = "x"

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.experiment = experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise AssertionError

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


class FakeMLflow(MLFlowLogger):
    """MLflow's logger with another client."""

    run_id = "7"
    experiment: Any = None

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment


def test_figures_and_texts_reach_each_logger_by_its_own_method() -> None:
    figure = Figure()
    tensorboard, comet, bare = Experiment("add_figure", "add_text"), Experiment("log_figure", "log_text"), Experiment()
    wandb = Bearer(Experiment())
    for name in ("log_image", "log_text"):
        own = Experiment(name)
        setattr(wandb, name, getattr(own, name))
        setattr(wandb, f"{name}_calls", own.calls)
    files = Experiment("log_figure", "log_text", "log_image")  # images are others there
    loggers = [Bearer(tensorboard), Bearer(comet), Bearer(bare), wandb, FakeMLflow(files)]
    log_figure(loggers, "conflict/heatmap", figure, 3)
    log_text(loggers, "convergence", "| a |", 4)
    assert tensorboard.calls == [
        ("add_figure", ("conflict/heatmap", figure, 3), {}),
        ("add_text", ("convergence", "| a |", 4), {}),
    ]
    assert comet.calls == [
        ("log_figure", (), {"figure_name": "conflict/heatmap", "figure": figure, "step": 3}),
        ("log_text", ("| a |",), {"step": 4, "metadata": {"name": "convergence"}}),
    ]
    assert wandb.log_image_calls == [("log_image", ("conflict/heatmap", [figure], 3), {})]  # type: ignore[attr-defined]
    assert wandb.log_text_calls == [  # type: ignore[attr-defined]
        ("log_text", ("convergence",), {"columns": ["text"], "data": [["| a |"]], "step": 4})
    ]
    assert files.calls == [
        ("log_figure", ("7", figure, "conflict/heatmap/3.png"), {}),
        ("log_text", ("7", "| a |", "convergence/4.md"), {}),
    ]


@pytest.mark.parametrize("value", [None, 1, 0.5, "trunk", True, {"a": 1.0}, ["trunk.0"], (1, 2)])
def test_hyperparameters_are_plain(value: Any) -> None:
    method = DWA()
    method.arguments = {"x": value}
    (found,) = hyperparameters_of(method).get("method_arguments", {"x": None}).values()
    assert found == value or found == repr(value)
    assert found is None or isinstance(found, bool | int | float | str | dict)
