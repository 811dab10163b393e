"""The base class of monitors of pairs of tasks: means over steps, a heatmap for each epoch, state that resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.monitors.base import Monitor, guarding
from lightning_mtl.monitors.figures import heatmap, require_matplotlib
from lightning_mtl.monitors.loggers import log_figure, loggers_of, step_of, take_figures
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PairMeans:
    """Averages a ``[K, K]`` matrix over steps in which some tasks may be absent.

    Example:
        >>> means = PairMeans(2)
        >>> means.add(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), [0, 1])
        >>> means.add(torch.tensor([[0.0]]), [1])
        >>> means.mean().tolist()
        [[1.0, 0.5], [0.5, 0.5]]
    """

    def __init__(self, num_tasks: int) -> None:
        self.sums = torch.zeros(2, num_tasks, num_tasks, dtype=torch.float64)

    def add(self, values: Tensor, present: Sequence[int]) -> None:
        """Add the values of the present tasks; values that are not finite are left out."""
        index = torch.tensor(list(present))
        grid = (index[:, None], index)
        known = values.isfinite()
        self.sums[0][grid] += torch.where(known, values, torch.zeros_like(values)).cpu().double()
        self.sums[1][grid] += known.cpu().double()

    def mean(self) -> Tensor:
        """Return the means, ``[K, K]``, nan for a pair that was never measured."""
        return self.sums[0] / self.sums[1]

    @property
    def empty(self) -> bool:
        """Return whether no value was added."""
        return not bool(self.sums[1].any())


@dataclass(frozen=True)
class PairReport(Report):
    """Shows a number for each pair of tasks.

    Attributes:
        title: What the numbers are.
        tasks: The tasks' names, for rows and columns.
        values: ``[K, K]``, the numbers as they are measured: those of :meth:`records` and the data frame.
        shown_values: ``[K, K]``, the numbers in the scale of table and picture.
        limits: The values at the ends of the color scale; None takes the largest beside the diagonal, around 0.
        from_to: What a row and a column are.
        caption: What a reader has to know of the scale.

    Example:
        >>> pairs = torch.tensor([[1.0, -0.25], [-0.25, 1.0]])
        >>> print(PairReport("cosines", ("age", "smile"), pairs, pairs).markdown())
        |       |   age | smile |
        | ----- | ----: | ----: |
        | age   | +1.00 | -0.25 |
        | smile | -0.25 | +1.00 |
    """

    title: str
    tasks: Sequence[str]
    values: Tensor
    shown_values: Tensor
    limits: tuple[float, float] | None = None
    from_to: tuple[str, str] = ("", "")
    caption: str = ""

    def shown(self) -> Shown:
        """Return the table: a row and a column for each task."""
        row, column = self.from_to
        grid = Grid([f"{row} ↓ {column} →" if column else "", *self.tasks])
        for task, values in zip(self.tasks, self.shown_values.tolist(), strict=True):
            grid.add(task, *("–" if math.isnan(value) else f"{value:+.2f}" for value in values))
        return Shown(grid, self.title, self.caption)

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return a row for each task, its name first, with a column for each task."""
        rows = zip(self.tasks, self.values.tolist(), strict=True)
        return (self.from_to[0] or "task", *self.tasks), [(task, *values) for task, values in rows]

    def figure(self) -> Figure:
        """Draw a heatmap.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        require_matplotlib("PairReport.figure()")
        row, column = self.from_to
        limits = self.limits or _symmetric(self.shown_values)
        return heatmap(
            self.shown_values,
            self.tasks,
            self.tasks,
            title=self.title if not self.caption else f"{self.title}: {self.caption}",
            limits=limits,
            row_label=row,
            column_label=column,
        )


class PairMonitor(Monitor):
    """Measures a number for each pair of tasks from the Gramian of their gradients; a base class.

    A subclass implements :meth:`Monitor.observe` and calls :meth:`count` and :meth:`write` there.

    Args:
        every_n_steps: Look at one optimizer step of n.
        at: Where gradients are measured.
        figure: Whether to draw a heatmap at each epoch's end.
        name: What the logged names begin with; it tells two monitors of one kind apart.
    """

    measures: ClassVar[Literal["losses", "gramian"]] = "gramian"
    title: ClassVar[str]
    from_to: ClassVar[tuple[str, str]] = ("", "")
    caption: ClassVar[str] = ""
    limits: tuple[float, float] | None = None

    def __init__(self, *, every_n_steps: int, at: str | Sequence[str], figure: bool, name: str) -> None:
        own = type(self).__name__
        if every_n_steps < 1:
            raise ValueError(f"{own}(every_n_steps={every_n_steps}) must be at least 1.")
        if not at:
            raise ValueError(f"{own}(at={at!r}) must be 'trunk', 'features', 'last_layer' or names of modules.")
        if not name:
            raise ValueError(f"{own}(name={name!r}) must not be empty: it is what the logged names begin with.")
        if figure:
            require_matplotlib(f"{own}(figure=True)")
        self.every_n_steps = every_n_steps
        self.at = at if isinstance(at, str) else tuple(at)
        self.figure = figure
        self.name = name
        self.tasks: tuple[str, ...] = ()
        self.main: frozenset[str] = frozenset()
        self.helps = torch.zeros(2, 0)  # of each task: in how many steps it helped the main ones, and of how many
        self.epoch, self.whole = PairMeans(0), PairMeans(0)

    def count(self, values: Tensor, tasks: Sequence[str]) -> None:
        """Add a step's values, ``[K, K]``, of the present tasks."""
        present = [self.tasks.index(task) for task in tasks]
        self.epoch.add(values, present)
        self.whole.add(values, present)

    @property
    def helped(self) -> dict[str, float]:
        """Return the share of the training's measured steps in which each auxiliary task helped the main tasks."""
        shares = zip(self.tasks, *self.helps.tolist(), strict=True)
        return {task: helped / known for task, helped, known in shares if known}

    def note_help(self, pl_module: pl.LightningModule, values: Tensor, tasks: Sequence[str]) -> None:
        """Count and log in which of the measured steps each auxiliary task helped the main ones.

        Args:
            pl_module: What is trained.
            values: ``[K]``, what the present tasks do for the main ones in this step, above 0 where they help.
            tasks: The present tasks.
        """
        found = {
            task: value
            for task, value in zip(tasks, values.tolist(), strict=True)
            if task not in self.main and math.isfinite(value)
        }
        for task, value in found.items():
            self.helps[:, self.tasks.index(task)] += torch.tensor([float(value > 0), 1.0])
        shares = self.helped
        scalars = {f"main/{task}": value for task, value in found.items()}
        scalars |= {f"helped/{task}": shares[task] for task in found}
        self.write(pl_module, {name: torch.tensor(value) for name, value in scalars.items()})

    def write(self, pl_module: pl.LightningModule, scalars: Mapping[str, Tensor]) -> None:
        """Log scalars at this step, also between the steps at which Lightning logs: they belong to this step."""
        named = {f"{self.name}/{key}": value.float().cpu() for key, value in scalars.items()}
        pl_module.trainer.callback_metrics.update(named)
        pl_module.trainer._logger_connector.log_metrics(named)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the module's tasks; refuse a second monitor that would log under the same names."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PairMonitor) and other is not self and other.name == self.name:
                raise ValueError(
                    f"Two monitors log under {self.name!r}; give one another name: {type(self).__name__}(name=...)."
                )
        found = self.tasks_of(pl_module)
        tasks = tuple(found)
        self.main = frozenset(task for task in tasks if found[task].role == "main")
        if stage == "fit" and (trainer.global_step == 0 or tasks != self.tasks):
            self.tasks, self.helps = tasks, torch.zeros(2, len(tasks))
            self.epoch, self.whole = PairMeans(len(tasks)), PairMeans(len(tasks))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the epoch's means for TensorBoard."""
        if self.off or self.epoch.empty:
            return
        with guarding([self]):
            # The means are the same on all ranks, so that rank 0 can draw them without asking the others.
            if self.figure and trainer.is_global_zero and take_figures(trainer):
                figure = self._report_of(self.epoch, f"epoch {trainer.current_epoch}").figure()
                log_figure(loggers_of(trainer), f"{self.name}/heatmap", figure, step_of(trainer))
        self.epoch = PairMeans(len(self.tasks))

    def report(self) -> PairReport:
        """Return the means over the training as a table, a data frame and a picture."""
        return self._report_of(self.whole, "all epochs")

    def _report_of(self, means: PairMeans, when: str) -> PairReport:
        where = self.at if isinstance(self.at, str) else ", ".join(self.at)
        values = means.mean()
        return PairReport(
            title=f"{self.title} at {where}, {when}",
            tasks=self.tasks,
            values=values,
            shown_values=self.readable(values),
            limits=self.limits,
            from_to=self.from_to,
            caption=self.caption,
        )

    def readable(self, values: Tensor) -> Tensor:
        """Return the means, ``[K, K]``, on the scale in which they are shown."""
        return values

    # Checkpoints

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, with the tasks' names."""
        sums = {"epoch": self.epoch.sums.clone(), "whole": self.whole.sums.clone(), "helps": self.helps.clone()}
        return {"tasks": list(self.tasks)} | sums

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums of an interrupted training; sums of other tasks are ignored."""
        if not self.tasks or state_dict["tasks"] == list(self.tasks):
            self.tasks = tuple(state_dict["tasks"])
            self.epoch.sums, self.whole.sums = state_dict["epoch"].clone(), state_dict["whole"].clone()
            self.helps = state_dict["helps"].clone()


def _symmetric(values: Tensor) -> tuple[float, float]:
    """Limits around 0, so that the middle color means neither help nor harm; the diagonal is ignored."""
    beside = values[~torch.eye(len(values), dtype=torch.bool)]
    found = beside[beside.isfinite()].abs()
    largest = float(found.max()) if len(found) else 1.0
    return -(largest or 1.0), largest or 1.0
