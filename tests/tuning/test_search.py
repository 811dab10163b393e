"""A search in one process: what it finds, writes and says, and how it is resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_mtl.configured import MultiTaskCLI
from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.tuning import search, tune
from lightning_mtl.tuning.configuration import BaseConfig
from lightning_mtl.tuning.goals import NotLoggedError
from lightning_mtl.tuning.identity import QUESTION, identity_of
from lightning_mtl.tuning.space import read_space
from lightning_mtl.tuning.storage import ERROR
from lightning_mtl.tuning.trial import TrialProcesses
from lightning_mtl.tuning.workers import SEED_VALUES
from tests.tuning.tiny import SPACE, Fixed, configuration

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def space(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SPACE), **changes}


def sampler() -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=0, n_startup_trials=3)


def trained(path: Path, tmp_path: Path) -> dict[str, float]:
    """What ``fit`` logs with a file."""
    arguments = ["fit", "--config", str(path), f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    trainer = MultiTaskCLI(arguments).trainer
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
def test_the_best_file_reproduces_the_objective_to_the_bit(tmp_path: Path) -> None:
    result = tune(configuration(tmp_path), space(), trials=3, sampler=sampler())
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 3
    ((number, path),) = result.best.items()
    assert number == result.study.best_trial.number
    assert trained(path, tmp_path)["val/loss/total"] == result.study.best_value
    values = [trial.value for trial in result.finished]
    assert values == sorted(values)  # type: ignore[type-var]
    assert len(set(values)) == 3  # what was drawn reaches the training
    assert {picture.name for picture in result.pictures} == {"history.png", "importances.png"}


@pytest.mark.slow
def test_a_trial_is_in_the_hparams_tab_with_its_importances_and_objective(tmp_path: Path) -> None:
    result = tune(configuration(tmp_path), space(), trials=2, folder="out", sampler=sampler())
    assert sorted(path.name for path in Path("out").glob("trial_*")) == ["trial_0000", "trial_0001"]
    events = EventAccumulator("out/trial_0001")
    events.Reload()
    assert events.Scalars("val/loss/total")[-1].value == pytest.approx(result.study.trials[1].value)
    saved = yaml.safe_load(Path("out/trial_0001/hparams.yaml").read_text())
    assert saved["importance.left"] + saved["importance.right"] == pytest.approx(2)
    assert saved["model.optimizer.lr"] == result.study.trials[1].params["model.optimizer.lr"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_without_a_storage_a_study_goes_on_in_its_folder(tmp_path: Path) -> None:
    (first,) = tune(configuration(tmp_path), space(), trials=1, sampler=sampler()).study.trials
    assert Path("studies/search/study.db").is_file()
    result = tune(configuration(tmp_path), space(), trials=2, sampler=sampler())
    assert result.study.trials[0].value == first.value
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 2
    with pytest.raises(ConfigurationError, match=r"study 'search' was begun with --seeds 1, not 2.*another name"):
        tune(configuration(tmp_path), space(), trials=3, seeds=2)


@pytest.mark.slow
def test_seeds_are_trained_each_and_their_mean_counts(tmp_path: Path) -> None:
    result = tune(configuration(tmp_path), space(), trials=1, seeds=3, sampler=sampler())
    (trial,) = result.study.trials
    by_seed = trial.user_attrs[SEED_VALUES]
    assert list(by_seed) == ["3", "4", "5"]
    assert len({tuple(values) for values in by_seed.values()}) == 3
    assert trial.value == pytest.approx(sum(values[0] for values in by_seed.values()) / 3)
    assert trained(result.best[0], tmp_path)["val/loss/total"] == by_seed["3"][0]


@pytest.mark.slow
def test_delta_m_compares_with_tasks_trained_alone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constructed = []

    def construct(*arguments: Any, **keywords: Any) -> MultiTaskCLI:
        constructed.append(arguments)
        return MultiTaskCLI(*arguments, **keywords)

    monkeypatch.setattr(search, "MultiTaskCLI", construct)
    storage = f"sqlite:///{tmp_path}/study.db"
    arguments: dict[str, Any] = {"storage": storage, "folder": "out", "sampler": sampler()}
    wanted = space(objective="val/delta_m")
    result = tune(configuration(tmp_path), wanted, trials=1, **arguments)
    cached = sorted(Path("out/baselines").iterdir())
    assert len(cached) == 2
    assert len(constructed) == 2  # one for each task: model, data and Trainer come together
    means = result.study.user_attrs["baselines"]
    logged = trained(result.best[0], tmp_path)
    assert logged["val/delta_m"] == result.study.best_value
    changes = [
        logged[f"val/MeanSquaredError/{task}"] / means[task]["MeanSquaredError"] - 1 for task in ("left", "right")
    ]
    assert logged["val/delta_m"] == pytest.approx(50 * sum(changes), rel=1e-5)

    for path in cached:
        path.unlink()
    again = tune(configuration(tmp_path), wanted, trials=1, **arguments)
    assert not list(Path("out/baselines").iterdir())  # they are in the study
    assert len(again.study.trials) == 1


@pytest.mark.slow
def test_several_objectives_make_a_pareto_front(tmp_path: Path) -> None:
    goals = {"val/loss/left": None, "val/MeanSquaredError/right": "minimize"}
    result = tune(configuration(tmp_path), space(objective=goals), trials=4, sampler=sampler())
    assert set(result.best) == {trial.number for trial in result.study.best_trials}
    for number, path in result.best.items():
        logged = trained(path, tmp_path)
        assert [logged[goal.name] for goal in result.goals] == result.study.trials[number].values
    assert "pareto_front.png" in {picture.name for picture in result.pictures}
    result.print_table()


@pytest.mark.slow
def test_a_mean_of_metrics(tmp_path: Path) -> None:
    goal = {"mean": ["val/loss/left", "val/loss/right"]}
    result = tune(configuration(tmp_path), space(objective=goal), trials=1, sampler=sampler())
    logged = trained(result.best[0], tmp_path)
    assert result.study.best_value == pytest.approx((logged["val/loss/left"] + logged["val/loss/right"]) / 2)


@pytest.mark.slow
def test_a_study_resumes_up_to_the_number_asked_for(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    for trials, expected in ((2, 2), (4, 4), (3, 4)):
        result = tune(configuration(tmp_path), space(), trials=trials, storage=storage, sampler=sampler())
        assert len(result.study.trials) == expected
    with pytest.raises(ConfigurationError, match="begun with another configuration or space"):
        tune(configuration(tmp_path, max_epochs=1), space(), trials=5, storage=storage)


def test_a_study_is_resumed_with_what_its_values_depend_on_alone(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()

    def begun(config: Any = None, space: Any = SPACE, seeds: int = 3, processes: int = 1) -> optuna.Study:
        base, wanted = BaseConfig(config or configuration(tmp_path), {}, processes), read_space(space)
        directions = [goal.direction_for({}) for goal in wanted.goals]
        asked = identity_of(base, wanted, directions, seeds)
        return search._study(storage, "mine", directions, False, None, asked, TrialProcesses(1))

    study = begun()
    turned = dict(reversed(configuration(tmp_path).items()))
    assert begun(turned).user_attrs == study.user_attrs
    for seeds in (1, 4):
        with pytest.raises(ConfigurationError, match=f"'mine' was begun with --seeds 3, not {seeds}: .*--name"):
            begun(seeds=seeds)
    for changed, names in (
        ({"config": configuration(tmp_path, max_epochs=1)}, r"\(trainer.max_epochs\)"),
        ({"config": configuration(tmp_path) | {"data": {"class_path": "Other"}}}, r"\(data.class_path\)"),
        ({"processes": 2}, r"\(number of processes\)"),
        ({"space": space(objective="val/loss/left")}, r"\(objective\)"),
        ({"space": space(objective={"val/loss/total": "maximize"})}, r"\(objective\)"),
        ({"space": space(weighting=["GradNorm"], importance=None)}, r"\(importance, weighting\)"),
        ({"space": space(parameters={"model.optimizer.lr": [0.1]})}, r"\(parameters.*lr, parameters.*widths\)"),
    ):
        with pytest.raises(ConfigurationError, match=f"begun with another configuration or space {names}"):
            begun(**changed)
    study.set_user_attr(QUESTION, "0123456789")  # what the first version wrote
    with pytest.raises(ConfigurationError, match="by an earlier version, which did not note the number of seeds"):
        begun()


@pytest.mark.slow
def test_other_seeds_are_refused_and_other_numbers_of_trials_are_not(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/study.db", "timeout": 0}
    tune(configuration(tmp_path), space(), trials=1, seeds=3, prune=True, **arguments)
    tune(configuration(tmp_path), space(), trials=9, seeds=3, **arguments)
    with pytest.raises(ConfigurationError, match="'search' was begun with --seeds 3, not 1"):
        tune(configuration(tmp_path), space(), trials=9, **arguments)


def test_a_timeout_begins_no_further_trial(tmp_path: Path) -> None:
    result = tune(configuration(tmp_path), space(), trials=2, timeout=0)
    assert not result.study.trials
    assert not result.best


@pytest.mark.slow
def test_a_training_that_fails_is_a_trial_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = space(parameters={"model.heads.left.in_features": [7]}, importance=None)
    result = tune(configuration(tmp_path), wanted, trials=2, sampler=sampler())
    assert len(result.failed) == 2
    assert "shapes cannot be multiplied" in result.failed[0].user_attrs[ERROR]
    result.print_table()
    assert "Trials: 2 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unpromising_trial_is_pruned(tmp_path: Path) -> None:
    wanted = {"objective": "val/loss/total", "parameters": {"model.optimizer.lr": [1e-1, 1e-7]}}
    result = tune(
        configuration(tmp_path, max_epochs=3), wanted, trials=8, prune=True, sampler=Fixed([1e-1] * 6 + [1e-7, 1e-1])
    )
    states = [trial.state for trial in result.study.trials]
    assert states[6] == TrialState.PRUNED
    assert len(result.study.trials[6].intermediate_values) == 1
    assert TrialState.FAIL not in states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"val/loss/left": None, "val/loss/right": None}, "prunes for one objective"),
        ({"mean": ["val/loss/left", "val/loss/right"]}, "not a mean"),
    ],
)
def test_pruning_is_refused_where_it_cannot_be_done(tmp_path: Path, objective: Any, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        tune(configuration(tmp_path), space(objective=objective), trials=1, prune=True)


def test_an_objective_that_is_not_logged_ends_the_search_at_its_first_trial(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedError, match=r"logs no 'val/F1'\. There are .*val/loss"):
        tune(configuration(tmp_path), space(objective={"val/F1": "maximize"}), trials=3)


@pytest.mark.slow
def test_early_stopping_is_the_configurations(tmp_path: Path) -> None:
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stopping["init_args"] = {"monitor": "val/loss/total", "stopping_threshold": 1e9}  # type: ignore[assignment]
    result = tune(configuration(tmp_path, max_epochs=50, callbacks=[stopping]), space(), trials=1, folder="out")
    events = EventAccumulator("out/trial_0000")
    events.Reload()
    assert len(events.Scalars("val/loss/total")) <= 2
    assert trained(result.best[0], tmp_path)["val/loss/total"] == result.study.best_value
