"""The best epoch of each task, and the best compromise between the tasks, as checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.control.scores import (
    Mode,
    check_all_scored,
    check_named,
    check_validates,
    counts,
    higher_is_better,
    metrics_of,
    scores_of,
    tasks_of,
)
from lightning_mtl.metrics import mean_rank
from lightning_mtl.monitors.tables import Grid

Criterion = Callable[[Mapping[str, Mapping[str, float]]], float]


class Epoch(TypedDict):
    """A validation: when it was, what it gave the followed tasks, what the criterion says of it, and its file."""

    epoch: int
    step: int
    scores: dict[str, float]
    value: float | None
    path: str


class TaskCheckpoint(Checkpoint):
    r"""Keep a checkpoint of each task's best validation, and one of the best compromise between the tasks.

    The files lie beside those of Lightning's ``ModelCheckpoint``. A validation that is the best of several tasks has
    one file, and a file that is the best of nothing any more is removed: K tasks have K + 1 files at most. Each is a
    checkpoint as Lightning writes it, with heads and trunk of the same moment. A head does not fit the trunk of another
    one: to keep one trunk and stop heads by themselves, see
    :class:`~lightning_mtl.control.TaskEarlyStopping` with ``then="head_only"``.

    The compromise is the validation with the lowest mean rank, as :func:`~lightning_mtl.metrics.mean_rank` compares
    methods, here over the validations so far:

    .. math:: R_t = \frac{1}{K} \sum_{k=1}^{K} \mathrm{rank}_k(t)

    or the one with the lowest ``val/delta_m``, or with the highest value of a function. Ranks of old validations change
    as new ones come, and a file that was removed does not come back: the lowest mean rank is that among the newest
    validation, the compromise so far and the tasks' best ones.

    Args:
        metrics: What is followed in validation: a metric's name as it is logged in ``val/<metric>/<task>``, or
            ``"loss"``; one for all tasks, or ``{task: name}``.
        compromise: ``"mean_rank"`` of the followed metrics; ``"delta_m"``, the mean change from ``Task.baseline`` as
            it is logged; or a function of a validation's scores ``{task: {metric: value}}``, higher being better.
            None keeps none.
        mode: ``"min"`` or ``"max"``, or ``{task: mode}``, for a metric that does not say whether higher is better.
        dirpath: The folder; None takes that of the Trainer's ``ModelCheckpoint``, or ``checkpoints`` in its log folder.
        save_weights_only: Leave out what only a resumed fit needs: optimizers, callbacks, loops.

    Raises:
        TypeError: At setup, if the module is no :class:`~lightning_mtl.MultiTaskModule`.
        ValueError: If ``compromise`` is none of these; at setup if a task or metric is unknown, ``"delta_m"`` finds no
            baseline, ``mode`` contradicts a metric, or the Trainer never validates; at the first validation if it has
            no sample of a followed task, or a metric gives no number.

    Example:
        >>> best = TaskCheckpoint("accuracy", compromise="delta_m")
        >>> best.compromise_path is None
        True
    """

    def __init__(
        self,
        metrics: str | Mapping[str, str],
        *,
        compromise: Literal["mean_rank", "delta_m"] | Criterion | None = "mean_rank",
        mode: Mode | Mapping[str, Mode] | None = None,
        dirpath: str | Path | None = None,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not metrics or not isinstance(metrics, str | Mapping):
            raise ValueError(f"{name}(metrics={metrics!r}) must be a metric's name, or {{task: name}}.")
        if not (compromise is None or callable(compromise) or compromise in ("mean_rank", "delta_m")):
            raise ValueError(f"{name}(compromise={compromise!r}) must be 'mean_rank', 'delta_m', a function or None.")
        for value in mode.values() if isinstance(mode, Mapping) else [mode]:
            if value not in ("min", "max", None):
                raise ValueError(f"{name}(mode={value!r}) must be 'min' or 'max'.")
        self.metrics, self.compromise, self.mode = metrics, compromise, mode
        self.dirpath = None if dirpath is None else str(dirpath)
        self.save_weights_only = save_weights_only
        self._metrics: dict[str, str] = {}
        self._higher: dict[str, bool] = {}
        self._module: Any = None  # setup has seen its tasks
        self._begin()

    def _begin(self) -> None:
        self.epochs: list[Epoch] = []
        self._best: dict[str, int] = {}  # positions in the list
        self._compromise: int | None = None
        self._prefix = ""
        self._pending = False  # whether a validation has ended that is not in the list yet

    @property
    def state_key(self) -> str:
        """Two of them in a Trainer, with other metrics or criteria, have states of their own."""
        criterion = getattr(self.compromise, "__qualname__", self.compromise)
        return self._generate_state_key(metrics=self.metrics, compromise=criterion)

    # What was kept

    def best_path(self, task: str) -> str | None:
        """Return the checkpoint of a task's best validation; None before the first.

        Raises:
            ValueError: If the task is not followed.
        """
        if self._metrics and task not in self._metrics:
            raise ValueError(f"{type(self).__name__} follows {list(self._metrics)}, and not {task!r}.")
        return self.epochs[self._best[task]]["path"] if task in self._best else None

    @property
    def compromise_path(self) -> str | None:
        """Return the checkpoint of the best compromise; None before the first."""
        return None if self._compromise is None else self.epochs[self._compromise]["path"]

    @property
    def best_model_path(self) -> str:
        """Return the compromise's checkpoint where there is one, for Lightning's ``ckpt_path="best"``."""
        return self.compromise_path or ""

    def table(self) -> Grid:
        """Return what each task loses at the compromise against its own best validation.

        ``print(checkpoint.table().text())`` writes it, and so do ``markdown()`` and ``rich()``.

        Raises:
            ValueError: If there is no compromise yet.
        """
        if self._compromise is None:
            raise ValueError("There is no compromise yet: fit first, and leave compromise at 'mean_rank' or the like.")
        chosen = self.epochs[self._compromise]
        grid = Grid(["task", "metric", "best", "epoch", f"compromise, epoch {chosen['epoch']}", "lost"], left=(0, 1))
        for task, metric in self._metrics.items():
            if task not in self._best or task not in chosen["scores"]:
                continue
            epoch = self.epochs[self._best[task]]
            best, found = epoch["scores"][task], chosen["scores"][task]
            lost = best - found if self._higher[task] else found - best
            grid.add(task, metric, f"{best:.4g}", str(epoch["epoch"]), f"{found:.4g}", f"{lost + 0.0:.4g}")
        return grid

    # What Lightning calls

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse settings that cannot work, and begin a fit with nothing kept."""
        name = type(self).__name__
        learned = tasks_of(name, pl_module)
        tasks = pl_module.tasks
        check_named(name, "mode", self.mode, tasks)  # type: ignore[arg-type]
        metrics = metrics_of(name, self.metrics, tasks)  # type: ignore[arg-type]
        higher = higher_is_better(name, metrics, tasks, self.mode)  # type: ignore[arg-type]
        if self.compromise == "delta_m" and not any(task.baseline for task in learned.values()):
            raise ValueError(
                f"{name}(compromise='delta_m') compares with baselines, and no task has one; give Task(baseline="
                "{metric: score of a model trained on it alone}), or use compromise='mean_rank'."
            )
        # A single-task baseline trains with the same callbacks: what it does not learn is as if it were not there.
        self._metrics = {task: metric for task, metric in metrics.items() if task in learned}
        self._higher = {task: higher[task] for task in self._metrics}
        self._module = pl_module
        if stage == "fit":  # a resumed run restores the state after this
            self._begin()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that never validates; find the folder, and names that no earlier fit has used in it."""
        check_validates(type(self).__name__, trainer)
        if self.dirpath is None:
            callbacks = trainer.checkpoint_callbacks
            found = next((c.dirpath for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
            log_dir = trainer.log_dir  # asked for on all ranks, which agree on it
            folder = str(found) if found else str(Path(log_dir or trainer.default_root_dir) / "checkpoints")
            self._folder = trainer.strategy.broadcast(folder)
        else:
            self._folder = self.dirpath
        if missing := [e["path"] for i, e in enumerate(self.epochs) if i in self._kept() and not _exists(e["path"])]:
            rank_zero_warn(
                f"{type(self).__name__} resumes, but {missing} are not there: a later epoch has replaced them, or they "
                "were moved. Their scores still count."
            )
        if not self._prefix:
            versions = iter(["tasks", *(f"tasks-v{number}" for number in range(1, 10_000))])
            free = next(version for version in versions if not any(Path(self._folder).glob(f"{version}-epoch=*.ckpt")))
            self._prefix = trainer.strategy.broadcast(free)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that a validation ends: another callback may write a checkpoint before this one is told."""
        self._pending = counts(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the newest validation's file if it is the best of something, and remove what is not any more."""
        if not counts(trainer) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._take_in()
        kept = self._kept()
        if len(self.epochs) - 1 in kept:
            trainer.save_checkpoint(self.epochs[-1]["path"], self.save_weights_only)
        for position, epoch in enumerate(self.epochs):
            if position not in kept and epoch["path"]:
                if position != len(self.epochs) - 1:
                    trainer.strategy.remove_checkpoint(epoch["path"])
                epoch["path"] = ""

    def _kept(self) -> set[int]:
        return {*self._best.values(), *([] if self._compromise is None else [self._compromise])}

    def _take_in(self) -> None:
        """Judge the newest validation, once; its scores are over all ranks, and so all judge alike."""
        if not self._pending or self._module is None:
            return
        self._pending = False
        name, module = type(self).__name__, self._module
        trainer = module.trainer
        scores = scores_of(name, module.stage_scores["val"], self._metrics)
        if not self.epochs:
            check_all_scored(name, scores, self._metrics)
        path = Path(self._folder) / f"{self._prefix}-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "scores": scores,
                "value": self._value_of(trainer, module),
                "path": str(path),
            }
        )
        newest = len(self.epochs) - 1
        candidates = sorted(self._kept() | {newest})
        for task, score in scores.items():
            best = self.epochs[self._best[task]]["scores"][task] if task in self._best else math.nan
            if not math.isnan(score) and not (score <= best if self._higher[task] else score >= best):
                self._best[task] = newest
        self._compromise = self._chosen(candidates)

    def _value_of(self, trainer: pl.Trainer, module: Any) -> float | None:  # noqa: ANN401 - setup has seen its tasks
        """What the criterion says of the newest validation, higher being better; None where it says nothing."""
        value = math.nan
        if callable(self.compromise):
            value = float(self.compromise({task: dict(own) for task, own in module.stage_scores["val"].items()}))
        elif self.compromise == "delta_m":
            value = -float(trainer.callback_metrics.get("val/delta_m", math.nan))
        return None if math.isnan(value) else value

    def _chosen(self, candidates: list[int]) -> int | None:
        """The best compromise among these validations, the earlier one of two that are as good."""
        if self.compromise is None:
            return None
        values = {position: self.epochs[position]["value"] for position in candidates}
        if self.compromise == "mean_rank":
            rows = {
                position: [e["scores"].get(t, math.nan) for t in self._metrics]
                for position, e in enumerate(self.epochs)
            }
            whole = [position for position, row in rows.items() if not any(map(math.isnan, row))]
            ranks = mean_rank([rows[p] for p in whole], list(self._higher.values())) if whole else []
            values = {p: -rank for p, rank in zip(whole, ranks, strict=True) if p in values}
        known = [(value, -position) for position, value in values.items() if value is not None]
        return -max(known)[1] if known else None

    def state_dict(self) -> dict[str, Any]:
        """All validations' scores, and which of them have files."""
        self._take_in()
        epochs, best = copy.deepcopy(self.epochs), dict(self._best)
        return {"epochs": epochs, "best": best, "compromise": self._compromise, "prefix": self._prefix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.epochs = copy.deepcopy(state_dict["epochs"])
        self._best = {task: at for task, at in state_dict["best"].items() if task in self._metrics}
        self._compromise, self._prefix = state_dict["compromise"], state_dict["prefix"]


def _exists(path: str) -> bool:
    return "://" in path or Path(path).exists()
