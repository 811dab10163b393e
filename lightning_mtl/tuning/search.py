"""Runs a search: from a configuration and a space to a study and the best configuration."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from lightning_mtl.configured import MultiTaskCLI
from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.method.base import Weighting
from lightning_mtl.transfer import single_task_baselines
from lightning_mtl.transfer.cache import digest
from lightning_mtl.transfer.progress import Progress, quiet
from lightning_mtl.tuning.addresses import without_passwords
from lightning_mtl.tuning.configuration import BaseConfig, check_space, read_base
from lightning_mtl.tuning.goals import Direction
from lightning_mtl.tuning.identity import identity_of, open_study
from lightning_mtl.tuning.result import Result, write_report
from lightning_mtl.tuning.space import Space, read_space
from lightning_mtl.tuning.storage import counting, fail_and_repeat, open_storage
from lightning_mtl.tuning.trial import TrialProcesses
from lightning_mtl.tuning.workers import Worker


def tune(
    config: str | Path | Mapping[str, Any],
    space: str | Path | Mapping[str, Any],
    *,
    trials: int,
    storage: str | Path | None = None,
    name: str = "search",
    folder: str | Path | None = None,
    seeds: int = 1,
    prune: bool = False,
    timeout: float | None = None,
    silence: int = 60,
    retry_running: bool = False,
    overrides: Sequence[str] = (),
    sampler: optuna.samplers.BaseSampler | None = None,
    progress: bool = True,
) -> Result:
    """Search over weightings and hyperparameters; also joins, or resumes, a study that exists.

    Args:
        config: What every trial begins with: a file as ``lightning-mtl fit`` takes it, or its content.
        space: What varies and what is improved: a YAML file, or its content.
        trials: How many trials the study shall have in the end, whoever runs them. Trainings that end with an error
            count; trials of workers that died are repeated, and do not.
        storage: Where workers meet: ``sqlite:///study.db`` or a journal file (``journal:///study.journal``) on one
            machine, ``postgresql://...`` or ``mysql://...`` across machines; None takes ``study.db`` in the folder.
        name: The study's name in the storage.
        folder: Where logs, the best configuration and pictures go; None takes ``studies/<name>``.
        seeds: Train each trial with so many seeds and take the mean; a study that exists keeps its number.
        prune: End trials whose objective, after an epoch, is worse than the median of the others. With several seeds
            the first one decides.
        timeout: Begin no trial after so many seconds.
        silence: Seconds without a sign of life after which a worker is taken for dead and its trial repeated. A
            journal file has no such signs.
        retry_running: Repeat the trials that are running: for a journal file whose workers were killed. No other
            worker may be at work.
        overrides: Further arguments for the configuration, as on the command line.
        sampler: One of Optuna's samplers; None takes TPE, which serves one objective and several.
        progress: Say on standard error what is searched, and which trial and seed trains.

    Raises:
        ConfigurationError: If configuration, space or storage are wrong, or do not go together, or the study was begun
            with other seeds, another configuration or another space, whose values are not comparable.

    Example:
        >>> result = tune("run.yaml", "space.yaml", trials=20, storage="sqlite:///study.db")  # doctest: +SKIP
        >>> result.best  # doctest: +SKIP
        {17: PosixPath('studies/search/best.yaml')}
    """
    for argument, value in (("trials", trials), ("seeds", seeds), ("silence", silence)):
        if value < 1:
            raise ConfigurationError(f"{argument}={value} must be at least 1.")
    folder = Path("studies") / name if folder is None else Path(folder)
    with isolate_rng(), quiet():
        base, wanted = read_base(config, overrides), read_space(space)
        directions = [goal.direction_for(base.tasks) for goal in wanted.goals]
        check_space(base, wanted)
        ranks = TrialProcesses(base.world_size)
        _check_pruning(wanted, prune)
        if ranks.size > 1 and storage is None:
            raise ConfigurationError("several ranks need a storage that all of them reach, such as sqlite:///study.db.")
        if storage is None:
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / 'study.db'}"
        opened = open_storage(storage, silence)
        asked = identity_of(base, wanted, directions, seeds)
        study = _study(opened, name, directions, prune, sampler, asked, ranks)
        if progress and ranks.leads:
            sys.stderr.write(announcement(study, wanted, directions, trials, seeds, storage, folder))
        base = with_baselines(base, wanted, study, folder, ranks, progress=progress)
        if retry_running and ranks.leads:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                fail_and_repeat(study, trial)
        with Progress("tune", trials * seeds, show=progress) as shown:
            Worker(study, opened, base, wanted, ranks, trials, seeds, folder, prune, silence, shown).work(timeout)
    if ranks.leads:
        return write_report(study, base, wanted, folder)
    return Result(study, wanted, list(base.tasks), {}, (), leads=False)


def announcement(
    study: optuna.Study,
    space: Space,
    directions: Sequence[Direction],
    trials: int,
    seeds: int,
    storage: str | Path,
    folder: Path,
) -> str:
    """Say what a search is about to do, in a line each: trials, objective, what varies, where it all goes."""
    there = len(counting(study.get_trials(deepcopy=False)))
    of_each = "" if seeds == 1 else f", {seeds} seeds each"
    goals = ", ".join(f"{way} {goal.name}" for way, goal in zip(directions, space.goals, strict=True))
    kept = without_passwords(str(storage))
    return (
        f"tune: study {study.study_name!r} in {kept}: {trials} trials{of_each}, {there} of them there already\n"
        f"tune: {goals}; varies {', '.join(space.varied())}\n"
        f"tune: logs, the best configuration and pictures go to {folder}/\n"
    )


def _check_pruning(space: Space, prune: bool) -> None:
    if not prune:
        return
    if len(space.goals) > 1:
        raise ConfigurationError("Optuna prunes for one objective, not for several; leave pruning out.")
    if len(space.goals[0].metrics) > 1:
        raise ConfigurationError(f"pruning follows one metric, not a mean; found objective {space.goals[0].name}.")


def _study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Direction],
    prune: bool,
    sampler: optuna.samplers.BaseSampler | None,
    asked: Mapping[str, int | str],
    ranks: TrialProcesses,
) -> optuna.Study:
    """Create the study or load it; of several workers one creates it.

    Raises:
        ConfigurationError: If it was begun with other seeds, another configuration or another space.
    """
    # In Optuna 5, running trials count as bad ones by default, so that workers do not all try the same.
    sampler = sampler or optuna.samplers.TPESampler()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner()
    return open_study(storage, name, directions, asked, ranks, sampler, pruner)


BASELINES = "baselines"


def with_baselines(
    base: BaseConfig,
    space: Space,
    study: optuna.Study,
    folder: Path,
    ranks: TrialProcesses,
    *,
    progress: bool = True,
) -> BaseConfig:
    """Put single-task scores into the configuration, where the objective is delta_m and it holds none.

    The first worker trains every task alone, with the configuration's own architecture and budget; its scores are kept
    in the study, for all workers and for when it is resumed.

    Raises:
        ConfigurationError: If the configuration does not list the tasks, so that no baseline can be put there.
    """
    wanted = any(metric.endswith("/delta_m") for goal in space.goals for metric in goal.metrics)
    if not wanted or any(task.baseline for task in base.tasks.values()):
        return base
    listed = base.values["model"].get("init_args", {}).get("tasks")
    if not (isinstance(listed, dict) and listed.keys() == base.tasks.keys()):
        raise ConfigurationError(
            "objective delta_m compares with single-task scores, and the configuration lists no tasks to put them "
            "into: give the module's tasks a Task(baseline=...)."
        )
    means = ranks.broadcast(study.user_attrs.get(BASELINES))
    if means is None:
        means = ranks.broadcast(_trained(base, folder, progress=progress))
        if ranks.leads:
            # Of two workers that trained at once, the first one's count for both.
            means = study.user_attrs.get(BASELINES) or means
            study.set_user_attr(BASELINES, means)
        means = ranks.broadcast(means)
    return base.with_baselines(means)


def _trained(base: BaseConfig, folder: Path, *, progress: bool) -> dict[str, dict[str, float]]:
    # A weighting has nothing to weigh in a task alone.
    values = base.for_scores(base.seed, Weighting, ModelCheckpoint)
    parts = _Parts(values)
    found = single_task_baselines(
        lambda seed: parts.take("model"),
        lambda seed: parts.take("datamodule"),
        lambda: parts.take("trainer"),
        seeds=(base.seed,),
        cache_dir=folder / "baselines",
        key=digest(values),
        progress=progress,
    ).usable()
    if not any(found.values()):
        raise ConfigurationError(
            "objective delta_m compares with single-task scores, and no task trained alone has come to one that is "
            "finite and not 0; lower the learning rate, or choose another objective."
        )
    return found


class _Parts:
    """Model, data and Trainers from a configuration. The parser makes all three at once; each is handed out once.

    Args:
        values: The configuration.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.unused: dict[str, Any] = {}

    def take(self, part: str) -> Any:  # noqa: ANN401 - the caller knows which it asked for
        """Return a model, datamodule or Trainer that was not used yet."""
        if part not in self.unused:
            cli = MultiTaskCLI(deepcopy(self.values), run=False, exit_on_error=False)
            self.unused = {"model": cli.model, "datamodule": cli.datamodule, "trainer": cli.trainer}
        return self.unused.pop(part)
