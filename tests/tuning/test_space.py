"""What varies: what methods declare, what a file says, and what is said of mistakes in it."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import optuna
import pytest

from lightning_mtl import weighting
from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Choice, Range
from lightning_mtl.task import Task
from lightning_mtl.tuning.configuration import BaseConfig, locate, trial_configuration
from lightning_mtl.tuning.goals import Goal, read_goals
from lightning_mtl.tuning.space import label, read_space
from tests.contract_rows import ROWS
from tests.tuning.tiny import configuration

METHODS: list[type[Weighting]] = [getattr(weighting, name) for name in sorted(weighting.__all__)]
REQUIRED = {row.name: row.required for row in ROWS}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_value_that_a_method_declares_constructs_it(method: type[Weighting]) -> None:
    values = [allowed.examples() for allowed in method.search_space.values()]
    for chosen in product(*values):
        arguments: dict[str, Any] = dict(zip(method.search_space, chosen, strict=True))
        made: Any = method(*REQUIRED.get(method.__name__, ()), **arguments)
        assert all(getattr(made, name) == value for name, value in arguments.items() if hasattr(made, name))


def test_methods_with_a_choice_of_their_own_declare_it() -> None:
    """Numbers that a constructor takes, beyond the base class's and what follows from the data."""
    left_out = {"importance", "start_step", "total", "every_n_steps", "seed", "min_weight", "eps", "loss_floor"}
    left_out.add("warmup_epochs")
    for method in METHODS:
        numeric = {
            name
            for name, argument in inspect.signature(method).parameters.items()
            if isinstance(argument.default, float) and name not in left_out
        }
        assert numeric <= method.search_space.keys(), method


def parsed(**content: Any) -> Any:
    return read_space({"objective": "val/loss/total", "weighting": ["MGDA"], **content})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"objektive": 1}, "unknown key 'objektive'. Did you mean objective"),
        ({"objective": 3}, "objective must be"),
        ({"objective": {"mean": []}}, r"objective.mean must list"),
        ({"objective": {"val/loss/total": "up"}}, "objective.val/loss/total must be minimize or maximize, found 'up'"),
        ({"weighting": ["MGDAA"]}, "'MGDAA' names no weighting. Did you mean MGDA"),
        ({"weighting": ["MLP"]}, "'MLP' names no weighting"),
        ({"weighting": ["MGDA", "MGDA"]}, "twice"),
        ({"weighting": ["DTP"]}, "DTP needs metric; give it as {class_path: DTP, init_args: {metric: "),
        ({"weighting": [{"class_path": "MGDA", "init_args": {"alpha": 1}}]}, "MGDA has no argument 'alpha'"),
        ({"weighting": [{"class_path": "MGDA", "args": {}}]}, r"found \['args'\]"),
        ({"weighting": None}, "nothing varies"),
        ({"weighting": None, "importance": "simplex"}, "list one or more under weighting"),
        ({"importance": "uniform"}, "importance must be 'simplex'"),
        ({"parameters": [1]}, "parameters must map"),
        ({"parameters": {"GradNorm.alpha": [1], "MGDA.alpha": [1]}}, "MGDA has no argument 'alpha'"),
        ({"parameters": {"model.lr": {"low": 1, "high": 0}}}, "parameters.model.lr: low=1.0 must be below high=0.0"),
        (
            {"parameters": {"model.lr": {"low": 0, "high": 1, "log": True}}},
            "low=0.0 must be above 0",
        ),
        ({"parameters": {"model.lr": {"low": 0.5, "high": 1, "integer": True}}}, "must be whole"),
        ({"parameters": {"model.lr": {"low": 0, "high": 1, "log": 1}}}, "log must be true or false"),
        ({"parameters": {"model.lr": {"low": "a", "high": 1}}}, "parameters.model.lr: could not convert"),
        ({"parameters": {"model.lr": {"low": 0}}}, "parameters.model.lr must be {low: ..., high: ...}"),
        ({"parameters": {"model.lr": []}}, "parameters.model.lr: choices must hold one value"),
        ({"parameters": {"model.lr": [1, 1]}}, "holds 1 twice"),
    ],
)
def test_a_mistake_in_a_space_names_its_key(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        parsed(**content)


def test_a_file_may_fix_or_replace_what_a_method_declares() -> None:
    fixed = parsed(weighting=[{"class_path": "GradNorm", "init_args": {"alpha": 1.5}}]).weightings[0]
    assert (fixed.fixed, set(fixed.space)) == ({"alpha": 1.5}, {"lr"})
    replaced = parsed(weighting=["GradNorm"], parameters={"GradNorm.alpha": [0.5, 1.5], "GradNorm.min_weight": [0.1]})
    assert replaced.weightings[0].space["alpha"] == Choice((0.5, 1.5))
    assert replaced.weightings[0].space["min_weight"] == Choice((0.1,))
    assert not replaced.parameters
    assert parsed(parameters={"model.lr": {"low": "1e-4", "high": "1e-2"}}).parameters["model.lr"] == Range(1e-4, 1e-2)


def test_importances_are_uniform_on_the_simplex_and_sum_to_the_tasks() -> None:
    space = parsed(weighting=["StaticWeights"], importance="simplex")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.weighting_arguments(space.sample(study.ask(), "abc"), "abc")["weights"] for _ in range(400)]
    assert all(sum(weights.values()) == pytest.approx(3) for weights in drawn)
    # Dirichlet(1): a share is Beta(1, 2), of mean 1/3 and median 1 - sqrt(1/2).
    shares = sorted(weights["a"] / 3 for weights in drawn)
    assert sum(shares) / 400 == pytest.approx(1 / 3, abs=0.03)
    assert shares[200] == pytest.approx(1 - 0.5**0.5, abs=0.04)


def test_numbers_are_drawn_from_what_their_range_says() -> None:
    ranges: dict[str, Any] = {
        "rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "share": {"low": 0, "high": 1},
        "width": {"low": 4, "high": 64, "log": True, "integer": True},
        "depth": {"low": 1, "high": 3, "integer": True},
    }
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    read_space({"objective": "val/loss/total", "parameters": ranges}).sample(trial, [])
    assert trial.distributions == {
        "rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "share": optuna.distributions.FloatDistribution(0, 1),
        "width": optuna.distributions.IntDistribution(4, 64, log=True),
        "depth": optuna.distributions.IntDistribution(1, 3),
    }


def test_choices_of_lists_nulls_and_mappings_come_back_as_they_are(tmp_path: Any) -> None:
    values: list[Any] = [None, "null", 1, True, [4, 8], {"class_path": "MLP", "init_args": {"widths": [4]}}]
    space = read_space({"objective": "val/loss/total", "parameters": {"model.trunk": values}})
    base = BaseConfig(configuration(tmp_path), {}, 1)
    for value in values:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.enqueue_trial({"model.trunk": label(value)})
        drawn = space.sample(study.ask(), [])
        found = trial_configuration(base, space, drawn, seed=0)["model"]["init_args"]["trunk"]
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "model.optimiser.lr",
            "names no parameter: model has no 'optimiser'. Did you mean optimizer",
        ),
        ("model.optimizer.init_args.lr.x", "is 0.01; give it as class_path and init_args"),
        ("trainer.callbacks.1.alpha", "trainer.callbacks is a list of 1"),
        ("nothing", "the configuration has no 'nothing'"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(tmp_path: Any, path: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        locate(configuration(tmp_path), path)


def test_directions_follow_from_names_or_are_asked_for() -> None:
    from torchmetrics import MeanSquaredError
    from torchmetrics.classification import MulticlassAccuracy

    def loss(prediction: Any, target: Any) -> Any:
        return prediction

    tasks = {"a": Task(loss, MulticlassAccuracy(3)), "b": Task(loss, MeanSquaredError())}
    for metric, expected in (
        ("val/loss/total", "minimize"),
        ("val/loss/a", "minimize"),
        ("loss_epoch/a", "minimize"),
        ("val/delta_m", "minimize"),
        ("val/MulticlassAccuracy/a", "maximize"),
        ("val/MeanSquaredError/b", "minimize"),
    ):
        assert Goal((metric,), None).direction_for(tasks) == expected
    for objective, message in (
        ("speed", "does not say whether higher is better; write {speed: ...}"),
        ("val/Accuracy/a", "task 'a' has no metric 'Accuracy'. Did you mean MulticlassAccuracy"),
        ("val/los/b", "task 'b' has no metric 'los'. Did you mean loss\\? There are MeanSquaredError, loss"),
        ("val/Accuracy/c", "names no task"),
        ({"mean": ["val/MulticlassAccuracy/a", "val/MeanSquaredError/b"]}, "does not say"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read_goals(objective)[0].direction_for(tasks)


@pytest.mark.parametrize(("listed", "said"), [(["GradNorm", "DWA"], r"\(GradNorm, DWA\)"), ([], r"\(none\)")])
def test_parameters_of_a_weighting_that_is_not_listed(listed: list[str], said: str) -> None:
    space = {"objective": "val/loss/total", "weighting": listed, "parameters": {"MGDA.total": [1.0, 2.0]}}
    with pytest.raises(ConfigurationError, match=rf"parameters\.MGDA\.total: MGDA is not among the weightings {said}"):
        read_space(space)
