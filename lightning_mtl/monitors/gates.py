"""What gates, masks and branches do, in TensorBoard."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mtl.monitors.base import Monitor
from lightning_mtl.monitors.figures import has_tensorboard, heatmap, log_figure, require_matplotlib
from lightning_mtl.monitors.gate_statistics import GateMeter, GateTable, GathersGates, ReportsGates


class GateUsage(Monitor):
    """Shows, at the end of an epoch, how much each task uses of each expert, and how open its attention is.

    Tables become heatmaps in TensorBoard, ``gates`` or ``attention`` by name; a number of each task becomes a scalar in
    any logger, ``attention_sparsity/<task>`` for instance. What is shown is the mean over the epoch's training samples
    of all ranks. It is added up on the device, and only while this callback asks for it; the training stays the same
    to the bit. A resumed epoch shows what came after the interruption.

    Any module of the model may take part: it defines ``gate_statistics()``, which names tables, ``[K]`` tensors or
    scalars; see :class:`~lightning_mtl.monitors.gate_statistics.ReportsGates`.

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

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to gather."""
        if self._shows(trainer):
            for meter in _meters(pl_module):
                meter.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what was gathered."""
        if not self._shows(trainer):
            return
        for path, module in _reporters(pl_module).items():
            for name, found in module.gate_statistics().items():
                self._show(trainer, pl_module, f"{path}/{name}" if path else name, found)
        self._stop(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather no more."""
        self._stop(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gather no more."""
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
        table = found if isinstance(found, GateTable) else _named(found, tasks)
        # NaN is blank on all ranks alike.
        values_on_all = trainer.strategy.reduce(table.values.detach().float().to(pl_module.device), reduce_op="mean")
        table = GateTable(torch.as_tensor(values_on_all).cpu(), table.rows, table.columns, table.limits)
        self.latest[name] = table
        if trainer.is_global_zero and has_tensorboard(trainer):
            figure = heatmap(
                table.values, table.rows, table.columns, title=name, limits=table.limits, colours="viridis"
            )
            log_figure(trainer, name, figure)


def _named(values: Tensor, tasks: tuple[str, ...]) -> GateTable:
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
