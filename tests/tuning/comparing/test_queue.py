"""Several workers on one study: every training once, those of dead workers again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_mtl.configured import ConfigurationError
from lightning_mtl.transfer.progress import Progress
from lightning_mtl.tuning.comparing import queue
from lightning_mtl.tuning.comparing.plan import Line, Plan, Training
from lightning_mtl.tuning.comparing.queue import JOB, Worker, read
from lightning_mtl.tuning.comparing.rows import EQUAL, Row, equal
from lightning_mtl.tuning.comparing.trainings import Outcome
from lightning_mtl.tuning.storage import MAX_RETRIES, open_storage, sign_of_life

LOSS = {"a": {"loss": False}}
PLAN = Plan((Line(EQUAL, LOSS), Line("other", LOSS)), (0.01, 0.1, 1.0), 0, (1, 2), EQUAL)
ROWS = {name: Row(name, name, equal) for name in (EQUAL, "other")}
ALL = 2 * 4 + 2 * 2 + 1  # both choices lie at the upper edge at first


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were trained; 10 is the best learning rate but for the next larger one, which is not tried."""
    keys: list[str] = []

    def train(source: object, row: Row, training: Training, *, steps: int | None = None) -> Outcome:
        keys.append(training.key)
        time.sleep(0.01)
        return Outcome({"a": {"loss": abs(training.candidate.rate - 1.1)}}, None, 0.1, 5)

    monkeypatch.setattr(queue, "train", train)
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.2)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return keys


def worker(storage: str, silence: int = 60) -> Worker:
    opened = open_storage(storage, silence)
    study = optuna.create_study(storage=opened, study_name="mine", load_if_exists=True)
    return Worker(study, opened, None, ROWS, PLAN, silence, Progress("compare", 0, show=False))  # type: ignore[arg-type]


def test_two_workers_do_every_training_once_and_a_third_finds_nothing_left(tmp_path: Path, trained: list[str]) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    both = [worker(storage), worker(storage)]
    threads = [threading.Thread(target=own.work) for own in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(Counter(trained).values()) == {1}
    assert len(trained) == ALL
    worker(storage).work()
    assert len(trained) == ALL
    known = read(both[0].study)
    assert PLAN.missing(known.scores) == []
    assert known.errors == {}


def test_what_was_interrupted_goes_on(tmp_path: Path, trained: list[str]) -> None:
    storage = f"journal:///{tmp_path}/study.journal"
    worker(storage).work(timeout=0.0)
    assert trained == []
    worker(storage).work(timeout=0.15)
    assert 0 < len(trained) < ALL
    worker(storage).work()
    assert len(trained) == len(set(trained)) == ALL


def test_a_training_that_was_interrupted_often_is_not_given_up(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = worker(f"journal:///{tmp_path}/study.journal")

    def interrupted(*_: object, **__: object) -> Outcome:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(queue, "train", interrupted)
        for _ in range(MAX_RETRIES + 2):
            with pytest.raises(KeyboardInterrupt):
                own.work()
    own.work()
    assert read(own.study).errors == {}
    assert len(trained) == ALL


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
@pytest.mark.parametrize("signs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_training_of_a_dead_worker_is_repeated(tmp_path: Path, trained: list[str], signs: bool) -> None:
    own = worker(f"sqlite:///{tmp_path}/study.db", silence=1)
    key = PLAN.missing({})[0].key
    own.study.enqueue_trial({}, user_attrs={JOB: key})
    lost = own.study.ask()
    if signs:  # it died later than that
        sign_of_life(own.storage, lost)
    own.work()
    assert sorted(trained) == sorted(set(trained))
    assert len(trained) == ALL
    assert key in trained
    assert own.study.trials[lost.number].state == optuna.trial.TrialState.FAIL


def test_a_score_that_is_missing_ends_the_comparison_after_the_first_training(
    tmp_path: Path, trained: list[str]
) -> None:
    storage = f"journal:///{tmp_path}/study.journal"
    own = worker(storage)
    own.directions = {"a": {"loss": False, "accuracy": True}}
    with pytest.raises(ConfigurationError, match=r"no score for accuracy of a.*'mine' was begun with other metrics"):
        own.work()
    assert len(trained) == 1
    worker(storage).work()  # with the metrics that there are, what was trained counts
    with pytest.raises(ConfigurationError, match="no score for accuracy of a"):
        own.known()
    assert len(trained) == ALL


def test_a_row_that_fails_leaves_the_others_and_equal_weights_end_the_comparison(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    working: Any = queue.train  # type: ignore[attr-defined]

    def train(source: object, row: Row, training: Training, *, steps: int | None = None) -> Outcome:
        if training.row == broken:
            raise ValueError("roles are missing")
        outcome: Outcome = working(source, row, training)
        return outcome

    monkeypatch.setattr(queue, "train", train)
    broken = "other"
    own = worker(f"journal:///{tmp_path}/study.journal")
    own.work()
    known = read(own.study)
    assert set(known.errors.values()) == {"ValueError: roles are missing"}
    assert len(known.outcomes) == 4 + 2 + 1
    queue.retry_failed(own.study)
    broken = ""
    own.work()
    assert len(read(own.study).outcomes) == ALL
    broken = EQUAL
    with pytest.raises(ValueError, match=r"equal weights.*roles are missing"):
        worker(f"journal:///{tmp_path}/other.journal").work()
