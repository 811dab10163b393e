"""The queue of a comparison: its trainings in an Optuna study, which any number of workers share."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_mtl.configured import ConfigurationError
from lightning_mtl.transfer.finished import Directions, chosen_scores
from lightning_mtl.transfer.progress import Progress
from lightning_mtl.tuning.comparing.plan import Plan, Scores, Training
from lightning_mtl.tuning.comparing.rows import EQUAL, Row
from lightning_mtl.tuning.comparing.setups import Source
from lightning_mtl.tuning.comparing.trainings import Outcome, train
from lightning_mtl.tuning.storage import ERROR, MAX_RETRIES, SURPLUS, counts, has_heartbeat
from lightning_mtl.tuning.turns import Turn, note_error, repeat_lost_trials

_logger = logging.getLogger(__name__)
# User attributes of a trial: the training's key, and what it has come to.
JOB, OUTCOME = "job", "outcome"
INTERRUPTED = "interrupted"  # by the user, which is no worker's death
RETRIED = "retried"  # user attribute of the study: numbers of failed trials that do not count any more
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Known:
    """Holds what the study knows of the trainings: outcomes of those that ended, errors of those that failed."""

    outcomes: Mapping[str, Outcome]
    errors: Mapping[str, str]

    @property
    def scores(self) -> Scores:
        """Return the scores on validation data by key; None for what failed."""
        return {**{key: own.val for key, own in self.outcomes.items()}, **dict.fromkeys(self.errors)}


def jobs_of(study: optuna.Study) -> list[FrozenTrial]:
    """Return the study's trials but for failed ones that are to be trained again."""
    retried = set(study.user_attrs.get(RETRIED, ()))
    return [trial for trial in study.get_trials(deepcopy=False) if trial.number not in retried]


def retry_failed(study: optuna.Study) -> None:
    """Let the trainings that ended with an error be trained again."""
    failed = [trial.number for trial in study.get_trials(deepcopy=False) if ERROR in trial.user_attrs]
    study.set_user_attr(RETRIED, failed)


def read(study: optuna.Study) -> Known:
    """Read a study's outcomes and errors; the first trial of a training counts."""
    outcomes: dict[str, Outcome] = {}
    errors: dict[str, str] = {}
    lost: Counter[str] = Counter()
    for trial in jobs_of(study):
        key = trial.user_attrs.get(JOB)
        if key is None or key in outcomes or key in errors:
            continue
        if trial.state == TrialState.COMPLETE and OUTCOME in trial.user_attrs:
            outcomes[key] = Outcome(**trial.user_attrs[OUTCOME])
        elif trial.state == TrialState.FAIL and ERROR in trial.user_attrs:
            errors[key] = trial.user_attrs[ERROR]
        elif trial.state == TrialState.FAIL and INTERRUPTED not in trial.user_attrs:
            lost[key] += 1
    for key, times in lost.items():
        if times > MAX_RETRIES and key not in outcomes:
            errors[key] = f"its worker died {times} times."
    return Known(outcomes, {key: said for key, said in errors.items() if key not in outcomes})


def is_taken(trials: list[FrozenTrial], key: str, before: int | None = None) -> bool:
    """Return whether a trial with a lower number, or any, waits, runs or has ended with this training."""
    return any(
        trial.user_attrs.get(JOB) == key and counts(trial)
        for trial in trials
        if before is None or trial.number < before
    )


@dataclass
class Worker:
    """Takes trainings from the queue until the plan has none left.

    Args:
        study: The study.
        storage: Its storage.
        source: What makes models, data and Trainers.
        rows: The rows by their keys.
        plan: What is wanted.
        silence: Seconds without a sign of life after which another worker is taken for dead.
        shown: What shows which training runs.
        directions: The scores that every training has to bring, of the tasks that it trains.
    """

    study: optuna.Study
    storage: BaseStorage
    source: Source
    rows: Mapping[str, Row]
    plan: Plan
    silence: int
    shown: Progress
    directions: Directions = field(default_factory=dict)
    _turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self._turn = Turn(self.study, self.storage, self._objective)

    def known(self) -> Known:
        """Read what the study knows.

        Raises:
            ConfigurationError: If equal weights, which all rows are compared with, ended with an error, or a training
                lacks a score that is to be compared.
        """
        found = read(self.study)
        self._check(found)
        return found

    def work(self, timeout: float | None = None) -> None:
        """Train until nothing is missing, or no new training may begin after so many seconds.

        Raises:
            ConfigurationError: As :meth:`known` does.
        """
        begun, told = time.monotonic(), False
        while timeout is None or time.monotonic() - begun < timeout:
            repeat_lost_trials(self.study, self.storage, self.silence)
            known, trials = self.known(), jobs_of(self.study)
            missing = self.plan.missing(known.scores)
            free = [training for training in missing if not is_taken(trials, training.key)]
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if free and not waiting:
                self.study.enqueue_trial({}, user_attrs={JOB: free[0].key})
            if free or waiting:
                self._turn.take()
            elif missing:  # other workers train what the next ones depend on
                if not told and not has_heartbeat(self.storage):
                    _logger.warning(
                        "%d trainings run in other workers. A journal file does not show whether these live: if they "
                        "do not, stop, and start again with retry_running (--retry-running).",
                        len(missing),
                    )
                told = True
                time.sleep(POLL_SECONDS)
            else:
                return

    def _objective(self, trial: optuna.Trial) -> float:
        known, trials = read(self.study), jobs_of(self.study)
        wanted = {training.key: training for training in self.plan.trainings(known.scores)}
        training = wanted.get(trial.user_attrs.get(JOB, ""))
        if training is None or training.key in known.scores or is_taken(trials, training.key, trial.number):
            trial.set_user_attr(SURPLUS, True)
            raise optuna.TrialPruned("Another worker has this training, or it is none of this comparison's.")
        self.shown.done = sum(key in known.scores for key in wanted)  # other workers train, too
        self.shown.total = self.plan.expected(known.scores)
        self.shown.begin(self.in_words(training))
        try:
            outcome = train(self.source, self.rows[training.row], training, steps=_steps(known))
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt:
            trial.set_user_attr(INTERRUPTED, True)
            raise
        except Exception as error:
            note_error(trial, error)
            raise
        trial.set_user_attr(OUTCOME, outcome.as_json())
        return 0.0  # the study is a queue; nothing is searched by its value

    def in_words(self, training: Training) -> str:
        """Say what a training is, in a line."""
        row = self.rows[training.row]
        alone = "" if training.task is None else f", {training.task}"
        variant = row.variants[training.candidate.variant]
        with_ = f" ({variant})" if variant else ""
        what = {"choose": "to choose", "compare": "compared", "monitor": "with monitors"}[training.purpose]
        return f"{row.name}{with_}{alone}, lr {training.candidate.rate:g}, seed {training.seed}, {what}"

    def _check(self, known: Known) -> None:
        try:
            for scores in (own for found in known.outcomes.values() for own in (found.val, found.test) if own):
                chosen_scores(scores, {task: self.directions[task] for task in scores if task in self.directions})
        except ValueError as error:
            raise ConfigurationError(
                f"{error} Where study {self.study.study_name!r} was begun with other metrics, go back to those, or "
                "give this comparison another name (--name)."
            ) from error
        for training in self.plan.trainings(known.scores):
            said = known.errors.get(training.key)
            if said is not None and training.row == EQUAL and training.purpose != "monitor":
                raise ConfigurationError(
                    f"equal weights, which all rows are compared with, cannot be trained: {said} Mend the cause, and "
                    "start again with retry_failed (--retry-failed)."
                )


def _steps(known: Known) -> int | None:
    """How many steps the trainings take."""
    return max((outcome.steps for outcome in known.outcomes.values()), default=None)
