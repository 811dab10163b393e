"""Trains each task alone with the same budget, for comparison with multi-task models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.distributed import of_first
from lightning_mtl.task import Task
from lightning_mtl.transfer.cache import CallMemory, ScoreCache, configuration
from lightning_mtl.transfer.finished import Directions, TaskScores, chosen_scores, is_finished, of_seeds
from lightning_mtl.transfer.progress import Progress
from lightning_mtl.transfer.runs import (
    DataOrFactory,
    EvaluationStage,
    ModuleOrFactory,
    TrainerFactory,
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

    Scores that are not finite stand for a run that diverged; means leave them out.

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
        """Return each task's scores, averaged over the seeds with which it finished; NaN where there is none."""
        means: TaskScores = {}
        for task, metrics in self.higher_is_better.items():
            finished = self._finished(task)
            means[task] = {
                metric: math.fsum(scores[metric] for scores in finished) / len(finished) if finished else math.nan
                for metric in metrics
            }
        return means

    def _finished(self, task: str) -> list[dict[str, float]]:
        directions = {task: self.higher_is_better[task]}
        chosen = [chosen_scores(scores, directions) for scores in self.scores]
        return [scores[task] for scores in chosen if is_finished(scores)]

    def usable(self) -> TaskScores:
        """Return the means from which a relative change can be taken: neither 0 nor NaN.

        What is left out, and means without some of the seeds, are warned of.
        """
        usable: TaskScores = {}
        for task, means in self.means().items():
            if marked := of_seeds(len(self._finished(task)), len(self.seeds)):
                rank_zero_warn(f"The baseline of task {task!r} is without the seeds that diverged{marked}.")
            usable[task] = {metric: value for metric, value in means.items() if value != 0 and math.isfinite(value)}
            for metric in means.keys() - usable[task].keys():
                rank_zero_warn(
                    f"The baseline of task {task!r} for {metric!r} is {means[metric]}; delta_m leaves it out."
                )
        return usable

    def fill(self, module: BalancedModule) -> None:
        """Set ``Task.baseline`` of the module's tasks to the means, so that it logs ``val/delta_m`` from now on.

        A mean that is 0 or not finite is left out with a warning: no relative change can be taken from it.
        """
        for name, means in self.usable().items():
            module.tasks[name].baseline = means


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
    progress: bool = True,
) -> SingleTaskBaselines:
    """Train each task alone, with the architecture, the budget and the data order of the whole model.

    For every seed and task a copy of the module is trained in which the other tasks are absent (see
    :func:`only_tasks`, also for what a subclass must do), then evaluated. If ``module`` is a module and no
    function, its ``Task.baseline`` are set to the means over the seeds.

    With ``cache_dir`` and ``key`` every run's scores are written when it ends, so that what was interrupted goes on
    where it was, and a second call trains nothing: it only asks ``trainer_factory`` for one Trainer, to read the budget
    from. The key names everything that is not in the model's parameters: the data; the code of models, losses and
    metrics; the losses' arguments; the optimizer and its numbers; versions of libraries; change it when one of them
    changes. Besides the key, what can be compared by value is: weights, attributes and classes of all parts of the
    model, losses and metrics, the optimizer's arguments, your own functions and classes as compiled code with the
    global values that they name, the Trainer's budget and callbacks, task, seed and stage. A difference there has the
    run repeated even where the key was kept. What no comparison sees is the key's alone: the data, files and
    environment variables, attributes of modules such as ``config.lr``, changes inside of libraries, and objects that
    show no attributes. All that was compared is in every file, under ``configuration``.

    Without a key nothing is written or read. Scores are then kept in this process, for a call that was interrupted, and
    count for its repetition with the very same module, data and Trainer functions, compared by value likewise.

    A run that diverged (its loss is not finite, or too many steps in a row were not) has NaN for scores, and the others
    go on.

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
        key: Names everything that is not in the model's parameters, as above: ``"faces v2, Adam 1e-3"``; it goes with
            ``cache_dir``.
        progress: Show one display for all runs, on standard error, in place of the Trainers' own bars, summaries and
            messages.

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
            f"cache_dir={cache_dir!r} and key={key!r} go together: the key names everything that is not in the model's "
            "parameters (data, code, losses' arguments, optimizer), such as key='faces v2, Adam 1e-3'. Change it when "
            "they change."
        )
    arguments = (module, *(datamodule if isinstance(datamodule, tuple) else (datamodule,)), trainer_factory)
    scores: list[TaskScores] = []
    directions: Directions = {}
    spare: list[pl.Trainer] = []  # asked for to read the budget from, for the next run
    memory = CallMemory.of_call(arguments) if cache_dir is None else nullcontext(ScoreCache(cache_dir))
    shown = Progress("single_task_baselines", 0, show=progress)
    with memory as cache, shown:
        for seed in seeds:
            with seeded(seed):
                whole = module if isinstance(module, BalancedModule) else module(seed)
            directions = metric_directions(chosen_tasks(whole, tasks), metrics)
            shown.total = len(seeds) * len(directions)
            scores.append({})
            for task in directions:
                shown.begin(f"seed {seed}, task {task}")
                model = only_tasks(whole, [task])
                spare = spare or [fresh(trainer_factory())]
                described = {
                    "key": key,
                    "task": task,
                    "seed": seed,
                    "stage": stage,
                    "ckpt_path": ckpt_path,
                    **configuration(model, spare[0]),
                }
                # Another process may write the file while the ranks look for it: rank 0 looks for all of them.
                found = of_first(cache.read(described))
                if found is None:
                    trainer = shown.only(spare.pop())
                    data = made_data(datamodule, seed)
                    found = fit_and_score(model, data, trainer, seed=seed, stage=stage, ckpt_path=ckpt_path)[task]
                    if cache_dir is None or trainer.is_global_zero:
                        cache.write(described, found)
                scores[-1].update(chosen_scores({task: found}, {task: directions[task]}))
    baselines = SingleTaskBaselines(tuple(seeds), tuple(scores), directions)
    if isinstance(module, BalancedModule):
        baselines.fill(module)
    return baselines


def chosen_tasks(module: BalancedModule, names: Sequence[str] | None) -> dict[str, Task]:
    """Return the tasks of these names.

    Raises:
        ValueError: If the module has not one of them.
    """
    if names is not None and (not names or (unknown := [name for name in names if name not in module.tasks])):
        raise ValueError(f"tasks={unknown if names else list(names)} must be among {list(module.tasks)}.")
    return {name: task for name, task in module.tasks.items() if names is None or name in names}
