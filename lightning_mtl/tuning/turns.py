"""One turn of a worker: it takes a trial of the study, and tells how it ended; trials of dead workers are repeated."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage

from lightning_mtl.tuning.storage import (
    ERROR,
    WORKER,
    fail_and_repeat,
    fail_silent_trials,
    has_heartbeat,
    is_recovering,
    sign_of_life,
    without_sign,
)

_logger = logging.getLogger(__name__)
Objective = Callable[[optuna.Trial], float | list[float]]


class Turn:
    """Runs one trial at a time, and drops the result of one that was given to another worker meanwhile.

    Args:
        study: The study.
        storage: Its storage.
        objective: Trains a trial. Whatever it raises is that trial's own end; the next may do better.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage, objective: Objective) -> None:
        self.study, self.storage, self.objective = study, storage, objective
        self._running: optuna.Trial | None = None

    def take(self) -> None:
        """Run the trial that waits first, or a new one."""
        try:
            self.study.optimize(self._begun, n_trials=1, catch=(Exception,))
        except (ValueError, UpdateFinishedTrialError):
            # Optuna refuses the result of a trial that has ended.
            if (trial := self._running) is None or not self._has_ended(trial):
                raise
            _logger.warning(
                "Trial %d was given to another worker, as this one was silent for too long; its result does not count.",
                trial.number,
            )

    def _begun(self, trial: optuna.Trial) -> float | list[float]:
        self._running = trial
        sign_of_life(self.storage, trial)
        trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
        return self.objective(trial)

    def _has_ended(self, trial: optuna.Trial) -> bool:
        return self.study._storage.get_trial(trial._trial_id).state.is_finished()


def note_error(trial: optuna.Trial, error: Exception) -> None:
    """Keep in a trial that its training ended with an error: it counts, and is not repeated."""
    trial.set_user_attr(ERROR, f"{type(error).__name__}: {' '.join(str(error).split())}")


def repeat_lost_trials(study: optuna.Study, storage: BaseStorage, silence: int) -> None:
    """Queue the trials of workers that have died again, where the storage shows that.

    Args:
        study: The study.
        storage: Its storage.
        silence: Seconds without a sign of life after which a worker is taken for dead.
    """
    if not has_heartbeat(storage):
        return
    fail_silent_trials(study)
    # Whether the storage was away is known after a call to it.
    trials = study.get_trials(deepcopy=False)
    if not is_recovering(storage):
        for trial in without_sign(trials, silence):
            fail_and_repeat(study, trial)
