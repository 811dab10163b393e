"""A database that goes away: nothing is lost or told twice, and a password is never shown."""

from __future__ import annotations

import inspect
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from lightning_mtl.tuning import patience, result, tune, workers
from lightning_mtl.tuning.patience import LONGEST_WAIT, PATIENCE, PatientStorage, StorageAwayError
from lightning_mtl.tuning.storage import open_storage
from tests.tuning.tiny import SPACE, configuration

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with:UserWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
REASON = "server closed the connection"


class Clock:
    """Time that passes only by sleeping, and a database that is away for some of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.back_at = 0.0

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def time(self) -> float:
        return self.now

    def take_away(self, storage: RDBStorage) -> None:
        def statement(*_: Any) -> None:
            if self.now < self.back_at:
                raise sqlalchemy.exc.OperationalError("SELECT 1", None, Exception(REASON))

        sqlalchemy.event.listen(storage.engine, "before_cursor_execute", statement)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    # Optuna tries the creation of a trial five times by itself, and sleeps in between.
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda seconds: None)
    return made


@pytest.fixture
def storage(clock: Clock, tmp_path: Path) -> Iterator[PatientStorage]:
    opened = PatientStorage(
        f"sqlite:///{tmp_path}/study.db",
        sleep=clock.sleep,
        clock=clock.time,
        heartbeat_interval=15,
        grace_period=60,
    )
    clock.take_away(opened)
    yield opened
    opened.engine.dispose()


def test_every_call_of_optunas_cache_is_repeated() -> None:
    called = set(re.findall(r"self\._backend\.(\w+)\(", inspect.getsource(_CachedStorage)))
    by_hand = {"set_trial_state_values", "record_heartbeat", "_get_stale_trial_ids"}
    without_database = {"get_heartbeat_interval", "get_heartbeat_stale_trial_callback"}
    assert called - by_hand - without_database <= set(patience.CALLS)
    assert all(name in vars(PatientStorage) for name in by_hand)


CALLS: dict[str, Callable[[optuna.Study, optuna.Trial], Any]] = {
    "ask": lambda study, trial: study.ask(),
    "enqueue": lambda study, trial: study.enqueue_trial({"x": 0.5}),
    "draw": lambda study, trial: trial.suggest_float("x", 0, 1),
    "report": lambda study, trial: trial.report(1.0, step=0),
    "prune": lambda study, trial: trial.should_prune(),
    "attribute": lambda study, trial: trial.set_user_attr("a", 1),
    "of the study": lambda study, trial: study.set_user_attr("a", 1),
    "tell": lambda study, trial: study.tell(trial, 2.0),
    "read": lambda study, trial: study.get_trials(),
    "stale": lambda study, trial: optuna.storages.fail_stale_trials(study),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_until_the_database_is_back(name: str, storage: PatientStorage, clock: Clock) -> None:
    study = optuna.create_study(storage=storage, pruner=optuna.pruners.MedianPruner())
    trial = study.ask()
    clock.back_at = 100
    CALLS[name](study, trial)
    assert clock.waits == [1, 2, 4, 8, 16, 32, LONGEST_WAIT]
    found = optuna.load_study(storage=storage, study_name=study.study_name).trials
    assert len(found) == (2 if name in ("ask", "enqueue") else 1)
    assert found[0].state == (TrialState.COMPLETE if name == "tell" else TrialState.RUNNING)


def test_waiting_ends_after_ten_minutes_and_then_nobody_waits_again(storage: PatientStorage, clock: Clock) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    clock.back_at = 1e9
    with pytest.raises(StorageAwayError, match=rf"study\.db' is away: {REASON}; the same command goes on"):
        study.tell(trial, 1.0)
    assert sum(clock.waits) == PATIENCE
    waited = len(clock.waits)
    with pytest.raises(StorageAwayError):
        study.get_trials()
    assert len(clock.waits) == waited


def test_what_is_wrong_is_not_repeated(storage: PatientStorage, clock: Clock) -> None:
    study = optuna.create_study(storage=storage, study_name="one")
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(storage=storage, study_name="one")
    with pytest.raises(KeyError):
        storage.get_trial(99)
    study.tell(study.ask(), 1.0)
    with pytest.raises(ValueError, match="Cannot tell"):
        study.tell(0, 2.0)
    assert not clock.waits


def test_a_result_whose_confirmation_was_lost_is_not_told_twice(
    storage: PatientStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=storage)
    trials = [study.ask(), study.ask()]
    original, told = RDBStorage.set_trial_state_values, []

    def lose_the_answer(*arguments: Any) -> bool:
        result = original(*arguments)
        told.append(arguments)
        if len(told) == 1:
            raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception(REASON))
        return result

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", lose_the_answer)
    study.tell(trials[0], 3.0)
    assert clock.waits == [1]
    assert study.trials[0].value == 3.0
    # Whoever finds that another worker has told a failure has to hear of it, or the trial would be repeated twice.
    storage.set_trial_state_values(trials[1]._trial_id, TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trials[1]._trial_id, TrialState.FAIL)


def test_nobody_is_taken_for_dead_for_a_while_after_the_database_was_away(
    storage: PatientStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    storage.record_heartbeat(trial._trial_id)
    clock.back_at = 20
    with caplog.at_level(logging.WARNING, logger=patience.__name__):
        storage.record_heartbeat(trial._trial_id)  # is left to the next one
        assert not clock.waits
        study.get_trials()
    assert [record.getMessage().partition(":")[0] for record in caplog.records if record.name == patience.__name__] == [
        "Storage 'sqlite",
        "The storage is back after 31 s.",
    ]
    monkeypatch.setattr(RDBStorage, "_get_stale_trial_ids", lambda *_: [trial._trial_id])
    states = []
    for seconds in (0, 60):
        clock.now += seconds
        optuna.storages.fail_stale_trials(study)
        states.append(study.trials[0].state)
    assert states == [TrialState.RUNNING, TrialState.FAIL]


def test_a_search_outlives_a_database_that_goes_away_in_a_trial(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = open_storage(f"sqlite:///{tmp_path}/study.db", silence=60)
    assert isinstance(opened, PatientStorage)
    opened._sleep, opened._clock = clock.sleep, clock.time
    clock.take_away(opened)
    monkeypatch.setattr("lightning_mtl.tuning.search.open_storage", lambda *_: opened)

    def train(*arguments: Any) -> list[float]:
        clock.back_at = clock.now + 20
        return [clock.now]

    monkeypatch.setattr(workers, "train", train)
    monkeypatch.setattr(result, "_draw", lambda *_: ())  # which takes longer than all else
    found = tune(configuration(tmp_path), SPACE, trials=3, storage="sqlite:///study.db")
    assert [trial.state for trial in found.study.trials] == [TrialState.COMPLETE] * 3
    assert [trial.value for trial in found.study.trials] == [0, 31, 62]


def test_a_result_of_a_trial_that_another_worker_took_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = iter(range(9))

    def train(job: Any, *arguments: Any) -> list[float]:
        number = next(numbers)
        if number == 0:
            other = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="search")
            other.tell(0, state=TrialState.FAIL)
        return [float(number)]

    monkeypatch.setattr(workers, "train", train)
    monkeypatch.setattr(result, "_draw", lambda *_: ())  # which takes longer than all else
    found = tune(configuration(tmp_path), SPACE, trials=2, storage=f"sqlite:///{tmp_path}/study.db")
    states = [trial.state for trial in found.study.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert "Trial 0 was given to another worker" in caplog.text


def test_the_text_of_a_driver_shows_no_password(storage: PatientStorage, clock: Clock) -> None:
    storage._address = "postgresql://ann:s%40cret@host/db"
    clock.back_at = 1e9
    reasons = ["s@cret is no password", "postgresql://ann:s%40cret@host/db", "password='s%40cret'"]
    for reason in reasons:
        storage._gave_up = True

        def refuse(reason: str = reason) -> None:
            raise sqlalchemy.exc.OperationalError("SELECT 1", None, Exception(reason))

        with pytest.raises(StorageAwayError) as raised:
            storage.patiently(refuse)
        assert "cret" not in "".join(traceback.format_exception(raised.value))
