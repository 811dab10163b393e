"""Trains each task alone with the same budget, for comparison with multi-task models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.module import MultiTaskModule
from lightning_mtl.task import Task
from lightning_mtl.transfer.cache import ScoreCache, configuration
from lightning_mtl.transfer.runs import (
    DataOrFactory,
    Directions,
    EvaluationStage,
    ModuleOrFactory,
    TaskScores,
    TrainerFactory,
    chosen_scores,
    fit_and_score,
    fresh,
    made_data,
    metric_directions,
    only_tasks,
    seeded,
)


@dataclass(frozen=True)
class SingleTaskBaselines:
    """Holds what each task scored when trained alone, from :func:`single_task_baselines` or from given numbers.

    Args:
        seeds: The seeds.
        scores: For each seed, ``{task: {metric: value}}``.
        higher_is_better: ``{task: {metric: whether higher is better}}``; every score listed is compared.

    Raises:
        ValueError: If seeds and scores differ in number, or a score is missing.

    Example:
        >>> alone = SingleTaskBaselines(
        ...     seeds=(0, 1),
        ...     scores=({"age": {"error": 5.0}}, {"age": {"error": 6.0}}),
        ...     higher_is_better={"age": {"error": False}},
        ... )
        >>> alone.means()
        {'age': {'error': 5.5}}
    """

    seeds: Sequence[int]
    scores: Sequence[TaskScores]
    higher_is_better: Directions

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.scores) or not self.seeds:
            raise ValueError(
                f"SingleTaskBaselines needs scores for each seed; found {len(self.scores)} for {len(self.seeds)} seeds."
            )
        for scores in self.scores:
            chosen_scores(scores, self.higher_is_better)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return tuple(self.higher_is_better)

    def means(self) -> TaskScores:
        """Return each task's scores, averaged over the seeds."""
        return {
            task: {
                metric: math.fsum(scores[task][metric] for scores in self.scores) / len(self.scores)
                for metric in metrics
            }
            for task, metrics in self.higher_is_better.items()
        }

    def fill(self, module: MultiTaskModule) -> None:
        """Set ``Task.baseline`` of the module's tasks to the means, so that it logs ``val/delta_m`` from now on.

        A mean that is 0 or not finite is left out with a warning: no relative change can be taken from it.
        """
        for name, means in self.means().items():
            usable = {metric: value for metric, value in means.items() if value != 0 and math.isfinite(value)}
            for metric in means.keys() - usable.keys():
                rank_zero_warn(
                    f"The baseline of task {name!r} for {metric!r} is {means[metric]}; delta_m leaves it out."
                )
            module.tasks[name].baseline = usable


def single_task_baselines(
    module: ModuleOrFactory,
    datamodule: DataOrFactory,
    trainer_factory: TrainerFactory,
    *,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    stage: EvaluationStage = "val",
    ckpt_path: str | None = None,
    cache_dir: str | Path | None = None,
    key: str | None = None,
) -> SingleTaskBaselines:
    """Train each task alone, with the architecture, the budget and the data order of the whole model.

    For every seed and task a copy of the module is trained in which the other tasks are absent (see
    :func:`only_tasks`, also for what a subclass must do), then evaluated. If ``module`` is a module and no
    function, its ``Task.baseline`` are set to the means over the seeds.

    With ``cache_dir`` every run's scores are written when it ends, so that what was interrupted goes on where it was,
    and a second call trains nothing: it only asks ``trainer_factory`` for one Trainer, to read the budget from. A run
    is found again if all it depends on is the same: architecture, weights, losses, optimizer, budget, task, seed, and
    ``key``, which stands for what the cache cannot see. What it does see is in every file, under ``configuration``.

    Args:
        module: The multi-task module, whose present weights every run begins with, or a function of the seed that
            makes one, ``lambda seed: Faces()``, called with all random numbers seeded: only then do seeds differ in
            their initial weights.
        datamodule: A datamodule, a pair ``(train_loader, evaluation_loader)``, or a function of the seed that makes
            one of both, called for each run. A loader with a random generator of its own needs such a function: else
            each run would begin where the last one has left the generator.
        trainer_factory: Called without arguments for a fresh Trainer, once for each run.
        seeds: One run for each.
        tasks: Names of the tasks to train; None takes all.
        metrics: Names of metrics to compare, ``"loss"`` possibly among them; None takes each task's metrics, or its
            loss if it has none.
        stage: Score on the validation or the test data.
        ckpt_path: ``"best"`` scores the checkpoint that the Trainer's ``ModelCheckpoint`` found best; None the last
            weights.
        cache_dir: A folder to keep scores in. Several machines must share it.
        key: Names the data and whatever else the cache cannot see, ``"faces v2"``; it goes with ``cache_dir``.

    Raises:
        ValueError: If a name is unknown, a seed missing or double, ``cache_dir`` comes without ``key``, or a Trainer
            has run before.

    Example:
        >>> alone = single_task_baselines(faces, (loader, val_loader), trainer, seeds=(0, 1, 2))  # doctest: +SKIP
        >>> alone.means()  # doctest: +SKIP
        {'age': {'loss': 0.26}, 'smile': {'loss': 0.5}}
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={tuple(seeds)} must be one or more, each once.")
    if (cache_dir is None) != (key is None):
        raise ValueError(
            f"cache_dir={cache_dir!r} and key={key!r} go together: the key names the data and what else the cache "
            "cannot see, such as key='faces v2'. Change it when they change."
        )
    cache = None if cache_dir is None else ScoreCache(cache_dir)
    read_only: pl.Trainer | None = None
    scores: list[TaskScores] = []
    directions: Directions = {}
    for seed in seeds:
        with seeded(seed):
            whole = module if isinstance(module, MultiTaskModule) else module(seed)
        directions = metric_directions(chosen_tasks(whole, tasks), metrics)
        scores.append({})
        for task in directions:
            model = only_tasks(whole, [task])
            described: dict[str, Any] = {"key": key, "task": task, "seed": seed, "stage": stage, "ckpt_path": ckpt_path}
            found = None
            if cache is not None:
                read_only = read_only or fresh(trainer_factory())
                described.update(configuration(model, read_only))
                found = cache.read(described)
            if found is None:
                trainer, read_only = read_only or fresh(trainer_factory()), None
                data = made_data(datamodule, seed)
                found = fit_and_score(model, data, trainer, seed=seed, stage=stage, ckpt_path=ckpt_path)[task]
                if cache is not None and trainer.is_global_zero:
                    cache.write(described, found)
            scores[-1].update(chosen_scores({task: found}, {task: directions[task]}))
    baselines = SingleTaskBaselines(tuple(seeds), tuple(scores), directions)
    if isinstance(module, MultiTaskModule):
        baselines.fill(module)
    return baselines


def chosen_tasks(module: MultiTaskModule, names: Sequence[str] | None) -> dict[str, Task]:
    """Return the tasks of these names.

    Raises:
        ValueError: If the module has not one of them.
    """
    if names is not None and (not names or (unknown := [name for name in names if name not in module.tasks])):
        raise ValueError(f"tasks={unknown if names else list(names)} must be among {list(module.tasks)}.")
    return {name: task for name, task in module.tasks.items() if names is None or name in names}
