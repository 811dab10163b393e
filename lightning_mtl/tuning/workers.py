"""Runs one worker of a study: it draws, trains and tells trials until there are as many as were asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.transfer.progress import Progress
from lightning_mtl.tuning.configuration import BaseConfig, trial_configuration
from lightning_mtl.tuning.goals import NotLoggedError
from lightning_mtl.tuning.pruning import Pruning
from lightning_mtl.tuning.space import Space, as_text
from lightning_mtl.tuning.storage import SURPLUS, counting, has_heartbeat, is_surplus
from lightning_mtl.tuning.trial import Job, RankError, TrialProcesses, train
from lightning_mtl.tuning.turns import Turn, note_error, repeat_lost_trials

POLL_SECONDS = 1.0
SEED_VALUES = "values_by_seed"


@dataclass
class Worker:
    """Works on a study as one process, or as one group of processes.

    Args:
        study: The study, on every rank.
        storage: Its storage.
        base: What every trial begins with.
        space: What varies.
        ranks: The processes that train a trial together.
        total: How many trials the study shall have in the end.
        seeds: How many trainings a trial's value is the mean of.
        folder: Where trials log.
        prune: Whether to end unpromising trials.
        silence: Seconds without a sign of life after which another worker is taken for dead.
        shown: What shows which trial and seed trains.
    """

    study: optuna.Study
    storage: BaseStorage
    base: BaseConfig
    space: Space
    ranks: TrialProcesses
    total: int
    seeds: int
    folder: Path
    prune: bool
    silence: int
    shown: Progress
    _stopped_by: Exception | None = field(default=None, init=False)
    _turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self._turn = Turn(self.study, self.storage, self._trial)

    def work(self, timeout: float | None = None) -> None:
        """Run trials until the study is complete, or no new one may begin after so many seconds.

        Raises:
            NotLoggedError: If the training does not log what is searched for.
        """
        if not self.ranks.leads:
            self._train_along()
            return
        begun = time.monotonic()
        try:
            while timeout is None or time.monotonic() - begun < timeout:
                repeat_lost_trials(self.study, self.storage, self.silence)
                trials = self.study.get_trials(deepcopy=False)
                counted = counting(trials)
                waiting = any(trial.state == TrialState.WAITING for trial in trials)
                if waiting or len(counted) < self.total:
                    self._turn.take()
                elif has_heartbeat(self.storage) and any(trial.state == TrialState.RUNNING for trial in counted):
                    time.sleep(POLL_SECONDS)  # one of them may have to be taken over
                else:
                    return
                if self._stopped_by is not None:
                    raise self._stopped_by
        finally:
            self.ranks.broadcast(None)

    def _trial(self, trial: optuna.Trial) -> float | list[float]:
        if is_surplus(self.study.get_trials(deepcopy=False), trial.number, self.total):
            trial.set_user_attr(SURPLUS, True)
            raise optuna.TrialPruned("There are enough trials: another worker was faster.")
        try:
            drawn = self.space.sample(trial, list(self.base.tasks))
            self.ranks.broadcast((trial.number, drawn))
            by_seed = self._train(trial, trial.number, drawn)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            note_error(trial, error)
            if isinstance(error, NotLoggedError):
                self._stopped_by = error
            raise
        trial.set_user_attr(SEED_VALUES, {str(self.base.seed + i): values for i, values in enumerate(by_seed)})
        means = [sum(values) / len(values) for values in zip(*by_seed, strict=True)]
        return means[0] if len(means) == 1 else means

    def _train_along(self) -> None:
        """What the other ranks do: train what rank 0 has drawn."""
        while (job := self.ranks.broadcast(None)) is not None:
            with suppress(optuna.TrialPruned, RankError, ConfigurationError):  # rank 0 tells the study
                self._train(None, *job)

    def _train(self, trial: optuna.Trial | None, number: int, drawn: Mapping[str, Any]) -> list[list[float]]:
        """Train every seed; an error on one rank is an error on all."""
        by_seed = []
        shown = self.space.in_words(drawn, list(self.base.tasks))
        for index in range(self.seeds):
            self.shown.done = number * self.seeds + index  # other workers may have had trials in between
            self.shown.begin(f"trial {number}, seed {self.base.seed + index}: {as_text(shown)}")
            name = f"trial_{number:04d}" + (f"_seed_{index}" if self.seeds > 1 else "")
            pruned = self.prune and index == 0
            pruning = [Pruning(trial, self.space.goals[0].metrics[0], self.ranks)] if pruned else []
            error: Exception | None = None
            try:
                values = trial_configuration(self.base, self.space, drawn, seed=self.base.seed + index)
                by_seed.append(train(Job(values, self.folder / name, shown), self.space.goals, pruning))
            except optuna.TrialPruned:
                raise
            except Exception as raised:
                if self.ranks.size == 1:
                    raise
                error = raised
            where = self.ranks.first_error(None if error is None else f"{type(error).__name__}: {error}")
            if isinstance(error, NotLoggedError):
                raise error
            if where is not None:
                raise RankError(where) from error
        return by_seed
