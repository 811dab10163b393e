"""The base class of monitors of pairs of tasks: means over steps, a heatmap for each epoch, state that resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.monitors.base import Monitor, guarding
from lightning_mtl.monitors.figures import has_tensorboard, heatmap, log_figure, require_matplotlib


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
            if self.figure and trainer.is_global_zero and has_tensorboard(trainer):
                row, column = self.from_to
                figure = heatmap(
                    self.epoch.mean(),
                    self.tasks,
                    self.tasks,
                    title=f"{self.title} at {self._where()}, epoch {trainer.current_epoch}",
                    limits=self.limits or _symmetric(self.epoch.mean()),
                    row_label=row,
                    column_label=column,
                )
                log_figure(trainer, f"{self.name}/heatmap", figure)
        self.epoch = PairMeans(len(self.tasks))

    def _where(self) -> str:
        return self.at if isinstance(self.at, str) else ", ".join(self.at)

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
