"""The result of a search: configurations to train again, a table, pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from lightning_mtl.monitors.figures import draw_history
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid, console_for_lines
from lightning_mtl.transfer.cache import write_whole
from lightning_mtl.tuning.configuration import BaseConfig, trial_configuration
from lightning_mtl.tuning.goals import Goal
from lightning_mtl.tuning.space import Space, as_text
from lightning_mtl.tuning.storage import ERROR, SURPLUS, counts
from lightning_mtl.tuning.workers import SEED_VALUES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 10


@dataclass(frozen=True)
class Result(Report):
    """Holds what a search has found.

    Attributes:
        study: Optuna's study.
        space: What was varied, and what searched for.
        tasks: The module's tasks.
        best: ``{number of the trial: its configuration}``: files for ``lightning-mtl fit --config``. One for a single
            objective, one for each trial of the Pareto front for several.
        pictures: The pictures drawn.
        leads: Whether this is rank 0, which alone writes files.

    Example:
        >>> result = tune("run.yaml", "space.yaml", trials=20)  # doctest: +SKIP
        >>> result.print_table()  # doctest: +SKIP
    """

    study: optuna.Study
    space: Space
    tasks: Sequence[str]
    best: Mapping[int, Path]
    pictures: tuple[Path, ...]
    leads: bool = True

    @property
    def goals(self) -> tuple[Goal, ...]:
        """Return the goals of the search."""
        return self.space.goals

    @property
    def finished(self) -> list[FrozenTrial]:
        """Return the trials that have a value, best first; with several objectives in their own order."""
        found = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(self.goals) > 1:
            return found
        upward = self.study.direction == optuna.study.StudyDirection.MAXIMIZE
        return sorted(found, key=lambda trial: trial.value or 0.0, reverse=upward)

    @property
    def failed(self) -> list[FrozenTrial]:
        """Return the trials that ended with an error, which is in their user attribute ``error``."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if ERROR in trial.user_attrs]

    @property
    def unfinished(self) -> list[FrozenTrial]:
        """Return the trials that run elsewhere, wait, or lost their worker without a heartbeat to show it."""
        states = (TrialState.RUNNING, TrialState.WAITING)
        return [trial for trial in self.study.get_trials(deepcopy=False, states=states) if counts(trial)]

    def shown(self) -> Shown:
        """Return the table of the best trials, with what became of the others below it."""
        grid = Grid(["trial", *(goal.name for goal in self.goals), "values"], left=(1 + len(self.goals),))
        listed = self.finished
        if len(self.goals) > 1:
            listed = [trial for trial in listed if trial.number in self.best]
        for trial in listed[:ROWS]:
            values = [f"{value:.6g}{_spread(trial, index)}" for index, value in enumerate(trial.values)]
            grid.add(str(trial.number), *values, as_text(self.space.in_words(trial.params, self.tasks)))
        return Shown(grid, f"Study {self.study.study_name}", self._told())

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return a row for each trial: number, state, the goals' values, and what was drawn; None if unknown."""
        trials = self.study.get_trials(deepcopy=False)
        drawn = {trial.number: self.space.in_words(trial.params, self.tasks) for trial in trials if trial.params}
        names = list(dict.fromkeys(name for own in drawn.values() for name in own))
        rows: list[tuple[Any, ...]] = []
        for trial in trials:
            values = trial.values or [None] * len(self.goals)
            own = drawn.get(trial.number, {})
            rows.append((trial.number, trial.state.name.lower(), *values, *(own.get(name) for name in names)))
        return ("trial", "state", *(goal.name for goal in self.goals), *names), rows

    def figure(self) -> Figure:
        """Draw each objective's value in each trial, and the best one so far.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best_of = [max if way == optuna.study.StudyDirection.MAXIMIZE else min for way in self.study.directions]
        found = {
            goal.name: [(trial.number, trial.values[place]) for trial in complete]
            for place, goal in enumerate(self.goals)
        }
        return draw_history(found, best_of, title=f"Study {self.study.study_name}")

    def print_table(self, console: Console | None = None) -> None:
        """Print the best trials, what became of the others, and where the files are."""
        console = console_for_lines(console)
        shown = self.shown()
        console.print(shown.grid.rich(title=shown.title, caption=shown.caption))
        for path in (*self.best.values(), *self.pictures):
            console.print(str(path), markup=False, highlight=False)

    def _told(self) -> str:
        trials = self.study.get_trials(deepcopy=False)
        told = {
            "complete": len(self.finished),
            "pruned": sum(t.state == TrialState.PRUNED and SURPLUS not in t.user_attrs for t in trials),
            "failed": len(self.failed),
            "unfinished": len(self.unfinished),
            "lost and repeated": sum(t.state == TrialState.FAIL and not counts(t) for t in trials),
        }
        lines = ["Trials: " + ", ".join(f"{count} {name}" for name, count in told.items() if count)]
        if self.failed:
            lines.append(f"First error, trial {self.failed[0].number}: {self.failed[0].user_attrs[ERROR]}")
        return "\n".join(lines)


def _spread(trial: FrozenTrial, index: int) -> str:
    by_seed = trial.user_attrs.get(SEED_VALUES, {})
    if len(by_seed) < 2:
        return ""
    values = [values[index] for values in by_seed.values()]
    return f" ({min(values):.4g} to {max(values):.4g})"


def write_report(study: optuna.Study, base: BaseConfig, space: Space, folder: Path) -> Result:
    """Write the best configurations and the pictures into a folder."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best: dict[int, Path] = {}
    if complete and len(space.goals) == 1:
        best[study.best_trial.number] = folder / "best.yaml"
    elif complete:
        best = {trial.number: folder / f"pareto_{trial.number:04d}.yaml" for trial in study.best_trials}
    by_number = {trial.number: trial for trial in complete}
    for number, path in best.items():
        trial = by_number[number]
        values = trial_configuration(base, space, trial.params, seed=base.seed)
        found = ", ".join(f"{goal.name} = {value!r}" for goal, value in zip(space.goals, trial.values, strict=True))
        header = f"# Trial {number} of study {study.study_name}: {found}\n# lightning-mtl fit --config {path.name}\n"
        write_whole(path, header + yaml.safe_dump(values, sort_keys=False))
    pictures = _draw(study, space.goals, folder) if len(complete) > 1 else ()
    return Result(study, space, list(base.tasks), best, pictures)


def _draw(study: optuna.Study, goals: Sequence[Goal], folder: Path) -> tuple[Path, ...]:
    """Optuna's own pictures: history and importance of each objective, the Pareto front of two or three."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as pictures

    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # all of Optuna's matplotlib pictures are
        warnings.simplefilter("ignore", UserWarning)  # layout hints of matplotlib
        for index, goal in enumerate(goals):
            ending = "" if len(goals) == 1 else f"_{index}"
            target = None if len(goals) == 1 else (lambda trial, index=index: trial.values[index])
            axes = pictures.plot_optimization_history(study, target=target, target_name=goal.name)
            drawn.append(_save(axes, folder / f"history{ending}.png"))
            if _varied(study):
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                axes = pictures.plot_param_importances(study, evaluator, target=target, target_name=goal.name)
                drawn.append(_save(axes, folder / f"importances{ending}.png"))
        if len(goals) in (2, 3):
            axes = pictures.plot_pareto_front(study, target_names=[goal.name for goal in goals])
            drawn.append(_save(axes, folder / "pareto_front.png"))
        plt.close("all")
    return tuple(drawn)


def _varied(study: optuna.Study) -> bool:
    """Whether some parameter of all trials took more than one value, so that its importance can be told."""
    found = [trial.params for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    common = set.intersection(*(set(params) for params in found))
    return any(len({str(params[name]) for params in found}) > 1 for name in common)


def _save(axes: Any, path: Path) -> Path:  # noqa: ANN401 - one Axes, or an array of them
    figure = axes.figure
    figure.set_size_inches(9, 5)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
