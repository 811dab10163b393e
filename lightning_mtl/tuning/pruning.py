"""Ends the training of an unpromising trial, on all ranks at once."""

from __future__ import annotations

import lightning.pytorch as pl
import optuna
from lightning.pytorch.callbacks import Callback

from lightning_mtl.tuning.trial import RankError, TrialProcesses


class Pruning(Callback):
    """Reports a metric to Optuna after every validation, and ends the training when Optuna says so.

    Rank 0 alone talks to the study. What came of it, an error included, is broadcast before anyone goes on: all ranks
    leave the training at the same place.

    Args:
        trial: The trial, on rank 0; None on the others.
        metric: The logged metric that the pruner looks at.
        ranks: The processes that train the trial together.

    Raises:
        optuna.TrialPruned: On all ranks, when the trial is pruned.
        RankError: On the other ranks, for an error on rank 0.
    """

    def __init__(self, trial: optuna.Trial | None, metric: str, ranks: TrialProcesses) -> None:
        self.trial, self.metric, self.ranks = trial, metric, ranks

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, and raise on every rank what rank 0 has to raise."""
        if trainer.sanity_checking:
            return
        error: Exception | None = None
        if self.trial is not None:
            try:
                self._report(self.trial, trainer, pl_module.current_epoch)
            except Exception as raised:  # noqa: BLE001 - whatever it is, the other ranks have to learn of it
                error = raised
        told = self.ranks.broadcast(None if error is None else (isinstance(error, optuna.TrialPruned), str(error)))
        if error is not None:
            raise error
        if told is not None:
            pruned, message = told
            raise optuna.TrialPruned(message) if pruned else RankError(f"rank 0: {message}")

    def _report(self, trial: optuna.Trial, trainer: pl.Trainer, epoch: int) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is None:  # the search says so when the trial ends
            return
        trial.report(float(value), step=epoch)
        if trial.should_prune():
            raise optuna.TrialPruned(f"Trial was pruned at epoch {epoch}.")
