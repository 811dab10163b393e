"""Which trials count, so that a study has exactly as many as were asked for.

Optuna numbers the trials of a study without gaps, whoever makes them. A trial counts unless its worker died, or it came
too late: as many as were asked for, with lower numbers, count already. Every worker finds the same.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

# User attributes of a trial.
ERROR = "error"
SURPLUS = "surplus"
WORKER = "worker"


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: it waits, runs, or has come to an end of its own.

    A training that ended with an error is one of them; a trial whose worker was killed, or interrupted, is not.
    """
    if SURPLUS in trial.user_attrs:
        return False
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def counting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count."""
    return [trial for trial in trials if counts(trial)]


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether a trial has come too late."""
    return sum(counts(trial) for trial in trials if trial.number < number) >= total


def without_sign(trials: Sequence[FrozenTrial], silence: int) -> list[FrozenTrial]:
    """Running trials that have never given a sign of life: their worker died between taking them and the first one."""
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
