"""The base of methods that look at the scores of each validation."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mtl.method.base import Weighting


class Validated(Weighting):
    """Takes in the scores at the end of each validation within a fit, sanity checks excepted."""

    follows_validation: bool = True
    """Whether validation's scores are needed, and a Trainer without validation refused."""
    without_validation: ClassVar[tuple[str, str]] = ("", "pass one")
    """The arguments that ask for a validation loader, and what to do where there is none."""

    @abstractmethod
    def validated(self, scores: dict[str, dict[str, float]]) -> None:
        """Take in ``{task: {"loss" or metric: value}}``; a task without samples has no entry."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand over the validation's scores."""
        if self.follows_validation and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            # Not from the Trainer's metrics: those keep an earlier validation's value of a task that this one lacked.
            self.validated(pl_module.recorder.scores["val"])  # type: ignore[union-attr,index,arg-type]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that never validates.

        Raises:
            ValueError: Naming the way out.
        """
        super().on_fit_start(trainer, pl_module)
        if self.follows_validation and not trainer.enable_validation:
            arguments, way_out = self.without_validation
            raise ValueError(
                f"{type(self).__name__}{arguments} needs a validation loader, and the Trainer has none; {way_out}."
            )
