"""A database storage that waits while its database is away."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lightning_mtl.tuning.addresses import has_password, shown, without_passwords

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
PATIENCE = 600.0  # seconds after which a call gives up
_logger = logging.getLogger(__name__)

# What the layers above call of the database: Optuna's cache, its trials and its search for silent workers.
CALLS = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "create_new_trial",
    "_create_new_trial",
    "set_trial_param",
    "_set_trial_param",
    "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "get_trial_param",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_all_trials",
    "_get_trials",
)


class StorageAwayError(RuntimeError):
    """Is raised when a database was away for longer than a worker waits; the message holds no password."""


class PatientStorage(RDBStorage):
    """Repeats every call that fails because the database is away, so that no trial's result is lost.

    The waits between attempts double from 1 s up to 60 s; after ten minutes the call gives up. While the database is
    away, and for the grace period after it is back, no worker is taken for dead: nobody could give a sign of life.

    A call whose answer was lost may be carried out twice. For the result of a trial, values and attributes that makes
    no difference. A trial that was created twice has no sign of life, and is repeated as that of a dead worker.

    Args:
        url: The database's address.
        sleep: Waits for so many seconds.
        clock: Returns the time in seconds.
        **options: Those of Optuna's ``RDBStorage``.

    Raises:
        StorageAwayError: By any call, if the database was away for ten minutes.
    """

    def __init__(
        self,
        url: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,  # noqa: ANN401 - Optuna's
    ) -> None:
        self._address, self._sleep, self._clock = url, sleep, clock
        self._away_since: float | None = None
        self._back_at: float | None = None
        self._gave_up = False
        super().__init__(url, **options)

    def patiently(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the call returns
        """Make a call until it comes through or patience ends."""
        begun, wait = self._clock(), FIRST_WAIT
        while True:
            try:
                result = call()
            except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
                if not is_away(error):
                    raise
                reason = self._note_away(error)
                away = self._clock() - begun
                if self._gave_up or away >= PATIENCE:
                    self._gave_up = True
                    raise StorageAwayError(
                        f"storage {shown(self._address)!r} is away: {reason}; the same command goes on "
                        "where the study is."
                    ) from (None if has_password(self._address) else error)
            else:
                self._note_back()
                return result
            self._sleep(min(wait, PATIENCE - away))
            wait = min(2 * wait, LONGEST_WAIT)

    def _note_away(self, error: Exception) -> str:
        # A session that broke in a transaction refuses whatever follows.
        self.scoped_session.remove()
        reason = without_passwords(line(error), self._address)
        if self._away_since is None:
            self._away_since = self._clock()
            _logger.warning("Storage %r is away, waiting for it: %s", shown(self._address), reason)
        return reason

    def _note_back(self) -> None:
        if (since := self._away_since) is not None:
            self._away_since, self._gave_up, self._back_at = None, False, self._clock()
            _logger.warning("The storage is back after %.0f s.", self._back_at - since)

    @property
    def recovering(self) -> bool:
        """Whether other workers may be silent because the database was away."""
        grace = float(self.grace_period or 0)
        return self._away_since is not None or (self._back_at is not None and self._clock() - self._back_at < grace)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Tell a trial's state; a result that the database took before it went away is not told twice."""
        attempts = 0

        def tell() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                if attempts == 1 or state == TrialState.FAIL:  # which another worker may have told
                    raise
                known = RDBStorage.get_trial(self, trial_id)
                if known.state != state or (values is not None and known.values != list(values)):
                    raise
                return True

        told: bool = self.patiently(tell)
        return told

    def record_heartbeat(self, trial_id: int) -> None:
        """Give a sign of life, or leave it to the next one, which comes soon."""
        try:
            super().record_heartbeat(trial_id)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            if not is_away(error):
                raise
            self._note_away(error)
        else:
            self._note_back()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        found: list[int] = self.patiently(lambda: RDBStorage._get_stale_trial_ids(self, study_id))
        return [] if self.recovering else found


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(storage: PatientStorage, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - the method's own
        return storage.patiently(lambda: method(storage, *arguments, **options))

    return call


for _name in CALLS:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def is_away(error: BaseException) -> bool:
    """Return whether an error says that the database cannot be reached, rather than that a statement is wrong."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated:
        return True
    away = (
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.TimeoutError,
        sqlalchemy.exc.PendingRollbackError,
    )
    return isinstance(cause, away)


def line(error: BaseException | None) -> str:
    """Return what a driver says, on one line."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    reason = getattr(cause, "orig", None) or getattr(cause, "__cause__", None) or cause
    return " ".join(str(reason).split()) or type(cause).__name__
