"""Collects statistics of gates, masks and branches without changing the training, and draws them in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_mtl.distributed import sum_over
from lightning_mtl.monitors.base import Monitor
from lightning_mtl.monitors.figures import heatmap, require_matplotlib
from lightning_mtl.monitors.loggers import log_figure, loggers_of, step_of, take_figures


@dataclass(frozen=True)
class GateTable:
    """Holds a matrix with names for its rows and columns: how much each task uses of each expert, for instance.

    Attributes:
        values: ``[R, C]``; NaN where there is nothing to say.
        rows: R names, those of tasks as a rule.
        columns: C names, those of experts as a rule.
        limits: The ends of the color scale; None takes the extremes found.
    """

    values: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    limits: tuple[float, float] | None = (0.0, 1.0)


@runtime_checkable
class ReportsGates(Protocol):
    """Marks a module that reports statistics of its gates, masks or branches."""

    def gate_statistics(self) -> Mapping[str, Tensor | GateTable]:
        """Return each statistic by name: a table, a ``[K]`` tensor in the order of the module's tasks, or a scalar."""


class GateMeter:
    """Keeps running means on the device, but only while a callback collects them.

    Numbers are detached and added up where they are; nothing waits for the device before :meth:`mean` is read. The
    meter is no part of a module's state: neither saved, nor sent between ranks, nor of any influence on training.

    Example:
        >>> import torch
        >>> meter = GateMeter()
        >>> meter.gathering = True
        >>> meter.add("a", torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> meter.mean("a")
        tensor([0.7500, 0.2500])
    """

    def __init__(self) -> None:
        self.gathering = False
        self._totals: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def start(self) -> None:
        """Forget the collected values and start to collect."""
        self.gathering = True
        self._totals, self._samples = {}, {}

    def add(self, name: str, values: Tensor) -> None:
        """Add ``[B, n]`` values, one row for each sample."""
        found = values.detach().float()
        total, samples = found.sum(0), found.new_full((), found.shape[0])
        if name in self._totals:
            total, samples = self._totals[name] + total, self._samples[name] + samples
        self._totals[name], self._samples[name] = total, samples

    def mean(self, name: str) -> Tensor | None:
        """Return the mean over all samples, ``[n]``; None without a sample."""
        return self._totals[name] / self._samples[name] if name in self._totals else None


@runtime_checkable
class GathersGates(ReportsGates, Protocol):
    """Marks a module whose statistics are means over the samples that its meter has collected."""

    gate_meter: GateMeter


class GateUsage(Monitor):
    """Shows, at the end of an epoch, how much each task uses of each expert, and how open its attention is.

    Tables become heatmaps in TensorBoard, ``gates`` or ``attention`` by name; a number of each task becomes a scalar in
    any logger, ``attention_sparsity/<task>`` for instance. What is shown is the mean over the epoch's training samples
    of all ranks. It is added up on the device, and only while this callback asks for it; the training stays the same
    to the bit. A resumed epoch shows what came after the interruption.

    Any module of the model may take part: it defines ``gate_statistics()``, which names tables, ``[K]`` tensors or
    scalars; see :class:`~lightning_mtl.monitors.gates.ReportsGates`.

    Args:
        every_n_epochs: Show one epoch in n.

    Raises:
        ValueError: If the number is below 1, or at setup if no part of the model has statistics.
        ModuleNotFoundError: If matplotlib is not installed.

    Attributes:
        latest: What was shown last, by name; tables on the CPU.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GateUsage()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"GateUsage(every_n_epochs={every_n_epochs}) must be at least 1.")
        require_matplotlib("GateUsage")
        self.every_n_epochs = every_n_epochs
        self.latest: dict[str, GateTable] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a model without gates."""
        if stage == "fit" and not _reporters(pl_module):
            raise ValueError(
                "GateUsage found nothing to show: no module of the model defines gate_statistics(). Use it with a "
                "trunk of lightning_mtl.architectures that has gates, masks or branches, or leave it out."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to collect where a run resumes in the middle of an epoch, which has begun before."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to collect."""
        if self._shows(trainer):
            for meter in _meters(pl_module):
                meter.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log what was collected."""
        if not self._shows(trainer):
            return
        for path, module in _reporters(pl_module).items():
            for name, found in module.gate_statistics().items():
                self._show(trainer, pl_module, f"{path}/{name}" if path else name, found)
        self._stop(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop collecting."""
        self._stop(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop collecting."""
        self._stop(pl_module)

    def _stop(self, pl_module: pl.LightningModule) -> None:
        for meter in _meters(pl_module):
            meter.gathering = False

    def _shows(self, trainer: pl.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, found: Tensor | GateTable) -> None:
        tasks = tuple(getattr(pl_module, "tasks", ()))
        if isinstance(found, Tensor) and found.ndim < 2:
            entries = zip(tasks, found.unbind(), strict=True) if found.ndim else (("", found),)
            values = {f"{name}/{task}" if task else name: value.detach().float() for task, value in entries}
            pl_module.log_dict(values, on_epoch=True, sync_dist=True)
            return
        table = found if isinstance(found, GateTable) else _as_table(found, tasks)
        # NaN is blank on all ranks alike.
        mean = sum_over(trainer, table.values.detach().float().to(pl_module.device)) / trainer.world_size
        table = GateTable(mean.cpu(), table.rows, table.columns, table.limits)
        self.latest[name] = table
        if trainer.is_global_zero and take_figures(trainer):
            figure = heatmap(table.values, table.rows, table.columns, title=name, limits=table.limits, colors="viridis")
            log_figure(loggers_of(trainer), name, figure, step_of(trainer))


def _as_table(values: Tensor, tasks: tuple[str, ...]) -> GateTable:
    rows = tasks if len(tasks) == len(values) else tuple(str(row) for row in range(len(values)))
    return GateTable(values, rows, tuple(str(column) for column in range(values.shape[1])), None)


def _reporters(pl_module: nn.Module) -> dict[str, ReportsGates]:
    """The modules with statistics by their path, the trunk itself by an empty one."""
    found: dict[str, ReportsGates] = {}
    for path, module in pl_module.named_modules():
        if isinstance(module, ReportsGates):
            # A compiled module answers for the one it holds, under whose name it is shown.
            parts = [part for part in path.split(".") if part != "_orig_mod"]
            found["/".join(parts[1:] if parts[:1] == ["trunk"] else parts)] = module
    return found


def _meters(pl_module: nn.Module) -> list[GateMeter]:
    return [module.gate_meter for module in _reporters(pl_module).values() if isinstance(module, GathersGates)]
