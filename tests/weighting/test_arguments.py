"""What the weightings refuse: each message names the method, the parameter and the value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAccuracy
from typing_extensions import Unpack

from lightning_mtl import MultiTaskModule, Signals, Task, Weighting
from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.weighting import (
    CRMOGM,
    DTP,
    DWA,
    FAMO,
    LBTW,
    MGDA,
    STCH,
    GradDrop,
    GradientNormBalance,
    GradNorm,
    StaticWeights,
    UncertaintyWeighting,
    UPGrad,
)
from tests.contract_rows import METHODS, ROWS
from tests.small import batch, heads, small, trunk
from tests.training import fit, loader
from tests.weightings import WeightedSum


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticWeights({"a": -1.0}), "StaticWeights gives task 'a' the weight -1.0; use a finite number >= 0"),
        (lambda: StaticWeights({"a": torch.nan}), "StaticWeights gives task 'a' the weight nan"),
        (lambda: UncertaintyWeighting({"a": "binary"}), "UncertaintyWeighting calls task 'a' a 'binary'; use one of"),  # type: ignore[dict-item]
        (lambda: UncertaintyWeighting(lr=0.0), "UncertaintyWeighting(lr=0.0) must be above 0"),
        (lambda: UncertaintyWeighting(regularizer="l2"), "regularizer='l2') must be 'log' or 'log1p'"),  # type: ignore[arg-type]
        (lambda: GradNorm(-1.0), "GradNorm(alpha=-1.0) must be at least 0"),
        (lambda: GradNorm(lr=0.0), "GradNorm(lr=0.0) must be above 0"),
        (lambda: GradNorm(min_weight=0.0), "GradNorm(min_weight=0.0) must be above 0"),
        (lambda: DWA(0.0), "DWA(temperature=0.0) must be above 0"),
        (lambda: MGDA("l1"), "MGDA(normalize='l1') must be None, 'l2', 'loss' or 'loss+'"),  # type: ignore[arg-type]
        (lambda: LBTW(-0.5), "LBTW(alpha=-0.5) must be at least 0"),
        (lambda: LBTW(reference="step"), "LBTW(reference='step') must be 'epoch' or 'training'"),  # type: ignore[arg-type]
        (lambda: GradientNormBalance(eps=0.0), "GradientNormBalance(eps=0.0) must be above 0"),
        (lambda: DTP("accuracy", gamma=-1.0), "DTP(gamma=-1.0) must be at least 0"),
        (lambda: DTP("accuracy", alpha=0.0), "DTP(alpha=0.0) must be above 0 and at most 1"),
        (lambda: DTP("accuracy", alpha=1.5), "DTP(alpha=1.5) must be above 0 and at most 1"),
        (lambda: DTP("accuracy", stage="test"), "DTP(stage='test') must be 'val' or 'train'"),  # type: ignore[arg-type]
        (lambda: MGDA(every_n_steps=0), "MGDA(every_n_steps=0) must be at least 1"),
        (lambda: MGDA(gradients="all"), "MGDA(gradients='all') must be 'automatic' or 'rows'"),  # type: ignore[arg-type]
        (lambda: MGDA(at=()), "MGDA(at=()) must be 'trunk', 'features', 'last_layer' or names of modules"),
        (lambda: MGDA(at=""), "MGDA(at='') must be"),
        (lambda: WeightedSum({}, at="last_layer"), "WeightedSum(at='last_layer') must be 'trunk' or 'features'"),
    ],
)
def test_arguments_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "StaticWeights"], ids=lambda row: row.name)
def test_arguments_that_all_have(row: Any) -> None:
    cls, name = type(row.make()), type(row.make()).__name__
    required = row.required
    for value in (-1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=re.escape(f"{name}(importance=...) gives task 'a' the factor {value}")):
            cls(*required, importance={"a": value})
    with pytest.raises(ValueError, match=re.escape(f"{name}(start_step=-1) must be at least 0")):
        cls(*required, start_step=-1)


COMMON = "importance start_step total"
GRADIENTS = f"{COMMON} at every_n_steps gradients"
# Spelled out, with what methods hand on to their base class: a common argument that a method has no use for is refused.
ACCEPTED = {
    "AlignedMTL": f"scale preference {GRADIENTS}",
    "CAGrad": f"c rescale {GRADIENTS}",
    "CRMOGM": f"weighting alpha {COMMON}",
    "CoVWeighting": COMMON,
    "ConFIG": GRADIENTS,
    "DBMTL": f"beta decay loss_floor {GRADIENTS}",
    "DTP": f"metric gamma alpha stage {COMMON}",
    "DWA": f"temperature {COMMON}",
    "DualProj": f"preference {GRADIENTS}",
    "ExcessMTL": f"step_size at {COMMON}",
    "FAMO": f"lr gamma losses_after min_losses loss_floor {COMMON}",
    "FairGrad": f"alpha max_norm preference {GRADIENTS}",
    "FromTorchJD": f"weighting seed {GRADIENTS}",
    "Frozen": f"weighting steps {COMMON}",
    "GLS": f"loss_floor {COMMON}",
    "GradDrop": "leak seed importance start_step at",
    "GradNorm": f"alpha lr min_weight {GRADIENTS}",
    "GradVac": f"beta seed {GRADIENTS}",
    "GradientNormBalance": f"eps {GRADIENTS}",
    "IGB": f"loss_floor {COMMON}",
    "IMTL": f"lr {GRADIENTS}",
    "IMTLG": GRADIENTS,
    "IMTLL": f"lr {COMMON}",
    "LBTW": f"alpha reference {COMMON}",
    "LRAnnealing": f"alpha main every_n_steps at {COMMON}",
    "MGDA": f"normalize {GRADIENTS}",
    "NashMTL": f"max_norm preference {GRADIENTS}",
    "PCGrad": f"seed {GRADIENTS}",
    "ReLoBRaLo": f"alpha tau rho seed {COMMON}",
    "Rotating": f"weighting {COMMON}",
    "RLW": f"distribution seed {COMMON}",
    "STCH": f"mu warmup_epochs preference {COMMON}",
    "SDMGrad": f"lam preference {GRADIENTS}",
    "ScaleInvariant": f"loss_floor {COMMON}",
    "SoftAdapt": f"beta loss_weighted normalized {COMMON}",
    "SoftOptimalUncertainty": f"temperature loss_floor {COMMON}",
    "StaticWeights": "weights start_step",
    "UPGrad": f"preference {GRADIENTS}",
    "UncertaintyWeighting": f"kinds lr regularizer {COMMON}",
}


def test_the_arguments_that_each_method_takes() -> None:
    assert {name: set(inspect.signature(type(make())).parameters) for name, make in METHODS.items()} == {
        name: set(accepted.split()) for name, accepted in ACCEPTED.items()
    }


def test_common_arguments_have_the_defaults_of_the_base_class_and_real_types() -> None:
    common = inspect.signature(Weighting).parameters
    for make in METHODS.values():
        for name, argument in inspect.signature(type(make())).parameters.items():
            if name in common and (type(make()), name) != (GradNorm, "at"):
                assert argument.default == common[name].default
                assert argument.kind is argument.KEYWORD_ONLY
    assert inspect.signature(MGDA).parameters["total"].annotation == float | None
    assert inspect.signature(GradNorm).parameters["at"].default == "last_layer"


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_arguments_are_refused(name: str) -> None:
    cls: Any = type(METHODS[name]())
    required = next((row.required for row in ROWS if row.name == name), ())
    for argument in ({*GRADIENTS.split()} - {*ACCEPTED[name].split()}) | {"strength"}:
        with pytest.raises(TypeError, match=f"^{name} has no argument '{argument}'; it takes .*start_step"):
            cls(*required, **{argument: 1})


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_maps_tasks_to_numbers_is_no_sequence(name: str) -> None:
    cls: Any = type(METHODS[name]())
    for argument in {"importance", *cls.by_task} & {*ACCEPTED[name].split()}:
        with pytest.raises(TypeError, match=rf"^{name}\({argument}=\[1, 2\]\) must be {{task: ...}}; found list"):
            cls(**{argument: [1, 2]})
    with pytest.raises(TypeError, match="found list"):
        StaticWeights([1.0, 2.0])  # type: ignore[arg-type]


def test_a_method_of_ones_own_takes_the_common_arguments_too() -> None:
    class Own(Weighting):
        def __init__(self, power: float = 1.0, **common: Unpack[CommonArguments]) -> None:
            super().__init__(at="features", **common)
            self.power = power

        def weigh(self, signals: Signals) -> Tensor:
            return signals.losses**self.power

    assert (Own(2.0, start_step=3).start_step, Own().at) == (3, "features")
    assert list(inspect.signature(Own).parameters) == ["power", "importance", "start_step", "total"]
    with pytest.raises(TypeError, match="Own has no argument 'every_n_steps'; it takes power, importance"):
        Own(every_n_steps=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'strength'"):
        WeightedSum({}, strength=1)  # takes anything, and its base class does not


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"DTP(metric='accuracy') is not among the metrics of task 'a', []"),
        (BinaryAccuracy(), r"DTP(metric='accuracy') is not among the metrics of task 'a', ['BinaryAccuracy']"),
        (
            MetricCollection({"accuracy": MeanAbsoluteError()}),
            "DTP(metric='accuracy') is MeanAbsoluteError for task 'a'",
        ),
    ],
)
def test_dtp_needs_a_performance_between_0_and_1(metrics: Any, message: str) -> None:
    module = MultiTaskModule(trunk(), heads(), {task: Task(mse_loss, metrics) for task in ("a", "b")})
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(module, loader(batch()), loader(batch()), callbacks=[DTP("accuracy")])


def test_dtp_needs_a_validation() -> None:
    metrics = MetricCollection({"accuracy": BinaryAccuracy()})
    module = MultiTaskModule(trunk(), heads(), {task: Task(mse_loss, metrics) for task in ("a", "b")})
    with pytest.raises(ValueError, match=re.escape("DTP(stage='val') needs a validation loader")):
        fit(module, loader(batch()), callbacks=[DTP("accuracy")])


@pytest.mark.parametrize(
    ("weighting", "argument"),
    [
        (StaticWeights({"z": 1.0}), "weights"),
        (UncertaintyWeighting({"z": "regression"}), "kinds"),
        (GradDrop({"z": 0.5}), "leak"),
        (STCH(preference={"z": 2.0}), "preference"),
        (UPGrad(preference={"z": 2.0}), "preference"),
        (FAMO(min_losses={"z": 2.0}), "min_losses"),
        (MGDA(importance={"z": 2.0}), "importance"),
        (CRMOGM(UPGrad(preference={"z": 2.0})), "preference"),
    ],
)
def test_names_of_unknown_tasks(weighting: Weighting, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\({argument}=...\) names \['z'\], but the tasks are \['a', 'b'\]"):
        fit(small(), loader(batch()), callbacks=[weighting])


def test_a_measurement_that_is_missing_is_named() -> None:
    signals = Signals(("a", "b"), torch.ones(2), step=3, epoch=0)
    with pytest.raises(ValueError, match="MGDA needs the gramian, which the signals of step 3 lack"):
        MGDA().weigh(signals)
    with pytest.raises(ValueError, match="GradientNormBalance needs the norms"):
        GradientNormBalance().weigh(signals)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (GradNorm, {"alpha": "x"}, "GradNorm(alpha='x') must be a number; found str."),
        (UncertaintyWeighting, {"lr": "a"}, "UncertaintyWeighting(lr='a') must be a number; found str."),
        (GradNorm, {"start_step": None}, "GradNorm(start_step=None) must be a number; found NoneType."),
        (GradNorm, {"total": [1.0]}, "GradNorm(total=[1.0]) must be a number; found list."),
        (
            StaticWeights,
            {"weights": {"a": "2"}},
            "StaticWeights(weights=...) gives task 'a' '2': it must be a number; found str.",
        ),
        (
            MGDA,
            {"importance": {"a": None}},
            "MGDA(importance=...) gives task 'a' None: it must be a number; found NoneType.",
        ),
    ],
)
def test_what_is_no_number_is_refused_by_name(method: type[Weighting], given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        method(**given)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    given: Any = {"a": torch.tensor(2.0)}
    assert GradNorm(alpha=np.float32(0.5), total=np.int64(2)).alpha == 0.5
    assert StaticWeights(given).weights == given
    assert GradNorm(total=None).total is None
