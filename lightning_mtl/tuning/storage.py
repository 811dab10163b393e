"""Opens the storage of a study, which workers share, and decides which of its trials count."""

from __future__ import annotations

import datetime
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.tuning.addresses import complete_address, has_password, missing_driver, shown, without_passwords
from lightning_mtl.tuning.patience import PatientStorage, line

MAX_RETRIES = 3  # of the same values, on which a worker may have died for a reason; then others are drawn
ATTEMPTS = 20
LOCK_SECONDS = 120


def open_storage(storage: str | Path | None, silence: int) -> BaseStorage:
    """Open a storage, and create it where it does not exist.

    Args:
        storage: The URL of a database, ``sqlite:///study.db``; a journal file, ``journal:///path/to/file`` or a path
            that ends in ``.journal``; None for this process's memory.
        silence: Seconds without a sign of life after which a worker is taken for dead. Databases only.

    Raises:
        ConfigurationError: If there is no such kind of storage, or it cannot be reached.
    """
    if storage is None:
        return InMemoryStorage()
    text = str(storage)
    if text.startswith("journal:///") or text.endswith(".journal"):
        path = Path(
            text.removeprefix("journal:///") if not text.startswith("journal:////") else text[len("journal://") :]
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        except OSError as error:
            raise ConfigurationError(f"storage={shown(text)!r} cannot be opened: {error}.") from error
    if "://" not in text:
        raise ConfigurationError(
            f"storage={shown(text)!r} is neither the URL of a database, such as sqlite:///study.db, nor a journal "
            "file, such as journal:///study.journal."
        )
    return _database(text, silence)


def _database(url: str, silence: int) -> PatientStorage:
    url = complete_address(url)
    for attempt in range(ATTEMPTS):
        storage, failure = _try_database(url, silence)
        if storage is not None:
            return storage
        # Two workers that begin at once may both make the tables: whoever comes second finds them made.
        if "unable to open" in line(failure) or (attempt >= 2 and not url.startswith("sqlite")):
            break
        time.sleep(random.uniform(0.05, 0.3))
    raise _refused(url, f"cannot be opened: {line(failure)}.", failure)


def _try_database(url: str, silence: int) -> tuple[PatientStorage | None, Exception | None]:
    try:
        return _open_database(url, silence), None
    except ImportError as error:
        raise ConfigurationError(missing_driver(url, _module(error))) from None
    except (sqlalchemy.exc.NoSuchModuleError, sqlalchemy.exc.ArgumentError, TypeError, ValueError) as error:
        raise _refused(url, f"names no usable database: {line(error)}", error) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        return None, error


def _module(error: ImportError) -> str:
    # Optuna raises an error of its own from the one that knows.
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    return cause.name or str(cause)


def _refused(url: str, why: str, cause: Exception | None) -> ConfigurationError:
    refused = ConfigurationError(f"storage={shown(url)!r} {without_passwords(why, url)}")
    # A traceback shows the texts of all causes, which are the drivers' and may hold a password.
    refused.__cause__ = None if has_password(url) else cause
    refused.__suppress_context__ = True
    return refused


def _open_database(url: str, silence: int) -> PatientStorage:
    sqlite = url.startswith("sqlite")
    engine: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if sqlite else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = PatientStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=max(1, silence // 4),
            grace_period=silence,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        )
    if sqlite:
        # Python's sqlite3 begins a transaction at the first write: two workers could read the same waiting trial, then
        # both take it. The recipe is SQLAlchemy's, "Enabling Non-Legacy SQLite Transactional Modes".
        sqlalchemy.event.listen(storage.engine, "connect", _begin_by_hand)
        sqlalchemy.event.listen(storage.engine, "begin", _lock_at_once)
        storage.engine.dispose()
    return storage


def _begin_by_hand(connection: Any, _: object) -> None:  # noqa: ANN401 - sqlite3.Connection, behind SQLAlchemy
    connection.isolation_level = None


def _lock_at_once(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def sign_of_life(storage: BaseStorage, trial: optuna.Trial) -> None:
    """Record a first heartbeat, before anything that takes time, where the storage has heartbeats."""
    if isinstance(storage, RDBStorage):
        storage.record_heartbeat(trial._trial_id)


def has_heartbeat(storage: BaseStorage) -> bool:
    """Return whether the storage shows that a worker has died."""
    return isinstance(storage, RDBStorage)


def is_recovering(storage: BaseStorage) -> bool:
    """Return whether workers may be silent because the storage was away."""
    return isinstance(storage, PatientStorage) and storage.recovering


def fail_silent_trials(study: optuna.Study) -> None:
    """Mark trials whose worker has died as failed, and queue their values again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


# User attributes of a trial.
ERROR = "error"
SURPLUS = "surplus"
WORKER = "worker"


def counts(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of those asked for: it waits, runs, or has ended by itself.

    A training that ended with an error is one of them; a trial whose worker was killed, or interrupted, is not.
    """
    if SURPLUS in trial.user_attrs:
        return False
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def counting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that count."""
    return [trial for trial in trials if counts(trial)]


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Return whether enough trials with lower numbers count already."""
    return sum(counts(trial) for trial in trials if trial.number < number) >= total


def without_sign(trials: Sequence[FrozenTrial], silence: int) -> list[FrozenTrial]:
    """Return running trials without any sign of life: their worker died before it could give one."""
    latest = datetime.datetime.now() - datetime.timedelta(seconds=silence)
    return [
        trial
        for trial in trials
        if trial.state == TrialState.RUNNING
        and WORKER not in trial.user_attrs
        and trial.datetime_start is not None
        and trial.datetime_start < latest
    ]


def fail_and_repeat(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a running trial as failed, and queue its values again."""
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    if trial.params:
        study.enqueue_trial(trial.params)
