"""A task whose validation stops improving leaves the training of what is shared, while the others go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_mtl.control.resting import NONE_RESTS, Resting
from lightning_mtl.control.scores import (
    Mode,
    check_all_scored,
    check_named,
    check_number,
    check_validates,
    counts,
    higher_is_better,
    metrics_of,
    of_task,
    scores_of,
    tasks_of,
)
from lightning_mtl.distributed import log_reduced

Then = Literal["drop", "head_only"]


class TaskEarlyStopping(Callback):
    r"""Stop each task by itself, once its validation has stopped improving.

    A task is done after ``patience`` validations in a row whose score :math:`s` is no better than its best one:

    .. math:: s \le s^* + \delta \ \text{(higher is better)}, \qquad s \ge s^* - \delta \ \text{(lower is better)}

    It then rests, from the next optimizer step on, while the others go on. Validation goes on with it. With
    ``then="drop"`` it counts as absent from every training batch: its weight is 0, its head gets no gradient, and no
    weight decay or momentum moves the head. With ``then="head_only"`` its head trains on, with weight 1, on features
    that the other tasks shape: no shared parameter gets a gradient from it. Either way the weighting is not asked about
    it, and what the weighting remembers of it stays, as of an absent task. ``active/<task>`` is logged once an epoch: 1
    while a task trains, 0 while it rests.

    The fit ends when all tasks are done, or those that ``until`` names. Where ``Trainer(min_epochs=...)`` puts the end
    off, the tasks that were done last train on until then.

    Args:
        metrics: What is followed in validation: a metric's name as it is logged in ``val/<metric>/<task>``, or
            ``"loss"``; one for all tasks, or ``{task: name}``. A task that is not named is never done.
        patience: Validations without an improvement before a task is done, at least 1; a number, or ``{task: number}``
            with 3 for tasks not named.
        mode: ``"min"`` or ``"max"``, or ``{task: mode}``, for a metric that does not say whether higher is better.
        min_delta: :math:`\delta`, the least improvement, in the metric's units; a number, or ``{task: number}`` with 0
            for tasks not named.
        then: What becomes of a task that is done, or ``{task: what}`` with ``"drop"`` for tasks not named.
        until: The task, or tasks, whose end is that of the fit. None stands for all tasks that train.
        regret: A resting task trains again once its score is worse than its best one by more than this, in the metric's
            units; a number, or ``{task: number}``. Its count begins anew, its best score stays. None: it never does.

    Raises:
        TypeError: If a number is none; at setup, if the module is no :class:`~lightning_mtl.MultiTaskModule`.
        ValueError: If an argument is out of its range; at setup if a task or metric is unknown, ``until`` names a task
            that is never done, ``mode`` contradicts a metric, the Trainer never validates or holds another callback of
            this class, or ``then="head_only"`` meets sharded parameters; at the first validation if it has no sample of
            a followed task, or its metric gives no number.

    The idea is that of early stopping for each task; Zhang et al., Facial Landmark Detection by Deep Multi-task
    Learning, ECCV 2014, stop auxiliary tasks for good when they no longer help. Deviation: they look at training and
    validation errors, here the validation's score alone decides.

    Example:
        >>> stopping = TaskEarlyStopping({"age": "loss", "smile": "accuracy"}, patience=2, then="head_only")
        >>> stopping.resting
        Resting(dropped=frozenset(), head_only=frozenset())
    """

    def __init__(
        self,
        metrics: str | Mapping[str, str],
        *,
        patience: int | Mapping[str, int] = 3,
        mode: Mode | Mapping[str, Mode] | None = None,
        min_delta: float | Mapping[str, float] = 0.0,
        then: Then | Mapping[str, Then] = "drop",
        until: str | Sequence[str] | None = None,
        regret: float | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not metrics or not isinstance(metrics, str | Mapping):
            raise ValueError(f"{name}(metrics={metrics!r}) must be a metric's name, or {{task: name}}.")
        check_number(name, "patience", patience, whole=True, least=1)
        check_number(name, "min_delta", min_delta)
        if regret is not None:
            check_number(name, "regret", regret)
        for argument, given, known in (("mode", mode, ("min", "max")), ("then", then, ("drop", "head_only"))):
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if value not in known and not (argument == "mode" and value is None):
                    raise ValueError(f"{name}({argument}={value!r}) must be {known[0]!r} or {known[1]!r}.")
        if until is not None and not until:
            raise ValueError(f"{name}(until={until!r}) names no task; None stands for all.")
        self.metrics, self.patience, self.mode, self.min_delta = metrics, patience, mode, min_delta
        self.then, self.regret = then, regret
        self.until = [until] if isinstance(until, str) else None if until is None else list(until)
        self._learned: list[str] = []
        self._metrics: dict[str, str] = {}
        self._higher: dict[str, bool] = {}
        self._begin()

    def _begin(self) -> None:
        self._best: dict[str, float] = {}
        self._waited: dict[str, int] = {}
        self._done: set[str] = set()  # the tasks that have stopped
        self._last: set[str] = set()  # those of them that train on, because with them all would rest
        self.resting = NONE_RESTS

    @property
    def done(self) -> list[str]:
        """The tasks that have stopped, in the module's order."""
        return [task for task in self._metrics if task in self._done]

    @property
    def best_scores(self) -> dict[str, float]:
        """The best score of each followed task so far."""
        return dict(self._best)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse settings that cannot work, and begin a fit with all tasks."""
        name = type(self).__name__
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, TaskEarlyStopping) for callback in callbacks) > 1:
            raise ValueError(f"The Trainer holds more than one {name}; give one of them all tasks.")
        learned = tasks_of(name, pl_module)
        tasks = pl_module.tasks
        for argument in ("patience", "mode", "min_delta", "then", "regret"):
            check_named(name, argument, getattr(self, argument), tasks)  # type: ignore[arg-type]
        metrics = metrics_of(name, self.metrics, tasks)  # type: ignore[arg-type]
        check_named(name, "until", dict.fromkeys(self.until or ()), tasks)  # type: ignore[arg-type]
        if never := [task for task in self.until or () if task not in metrics]:
            raise ValueError(f"{name}(until=...) waits for {never}, which no metric is followed of; name one.")
        higher = higher_is_better(name, metrics, tasks, self.mode)  # type: ignore[arg-type]
        # A single-task baseline trains with the same callbacks: what it does not learn is as if it were not there.
        self._learned = list(learned)
        self._metrics = {task: metric for task, metric in metrics.items() if task in learned}
        self._higher = {task: higher[task] for task in self._metrics}
        if isinstance(trainer.strategy, ModelParallelStrategy) and self.parts_heads:
            raise ValueError(
                f"{name}(then='head_only') differentiates heads by themselves, and sharded parameters (FSDP2) have "
                "gradients in the one backward pass only; use then='drop', or strategy='ddp'."
            )
        if stage == "fit":  # a resumed run restores the state after this
            self._begin()

    @property
    def parts_heads(self) -> bool:
        """Whether some task's head may come to train alone."""
        return "head_only" in map(self._what, self._metrics)

    def _what(self, task: str) -> Then:
        return of_task(self.then, task, "drop")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that never validates."""
        check_validates(type(self).__name__, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End at once where the checkpoint is that of the end."""
        trainer.should_stop = trainer.should_stop or self._ended()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the tasks by the newest validation: the scores are over all ranks, and so all decide alike."""
        if not counts(trainer):
            return
        name = type(self).__name__
        # Not from the Trainer's metrics: those keep an earlier validation's value of a task that this one lacked.
        scores = scores_of(name, pl_module.stage_scores["val"], self._metrics)  # type: ignore[index,arg-type]
        if not self._best and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_all_scored(name, scores, self._metrics)
        before = set(self._done)
        for task, score in scores.items():
            self._judge(task, score)
        stopped = sorted(self._done - before)
        all_rest = self._done.issuperset(self._learned)
        self._last = (set(stopped) or self._last) if all_rest else set()
        self._rest()
        for task in stopped:
            rank_zero_info(
                f"{name}: {task} is done, with a best {self._metrics[task]} of {self._best.get(task, math.nan):.4g}."
            )
        for task in sorted(before - self._done):
            rank_zero_info(f"{name}: {task} trains again, {self._metrics[task]} has fallen to {scores[task]:.4g}.")
        if self._ended():
            trainer.should_stop = True

    def _judge(self, task: str, score: float) -> None:
        sign = 1.0 if self._higher[task] else -1.0
        best = self._best.get(task, -sign * math.inf)
        gain = sign * (score - best)  # not a number never improves
        improved = gain > of_task(self.min_delta, task, 0.0) or (task not in self._best and not math.isnan(score))
        if improved:
            self._best[task] = score
        if task in self._done:
            regret = of_task(self.regret, task, None)
            if regret is not None and -gain > regret:
                self._done.discard(task)
                self._waited[task] = 0
            return
        self._waited[task] = 0 if improved else self._waited.get(task, 0) + 1
        if self._waited[task] >= of_task(self.patience, task, 3):
            self._done.add(task)

    def _rest(self) -> None:
        resting = self._done - self._last
        dropped = frozenset(task for task in resting if self._what(task) == "drop")
        self.resting = Resting(dropped, frozenset(resting) - dropped)

    def _ended(self) -> bool:
        awaited = [task for task in self.until or self._learned if task in self._learned] or self._learned
        return bool(awaited) and self._done.issuperset(awaited)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log which tasks train."""
        resting = self.resting.dropped | self.resting.head_only
        log_reduced(pl_module, {f"active/{task}": float(task not in resting) for task in self._learned})

    def state_dict(self) -> dict[str, Any]:
        """The best scores, the counts, and who rests."""
        done, last = self.done, sorted(self._last)
        return {"best": dict(self._best), "waited": dict(self._waited), "done": done, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; tasks that are not followed any more are left out."""
        self._best = {task: best for task, best in state_dict["best"].items() if task in self._metrics}
        self._waited = {task: count for task, count in state_dict["waited"].items() if task in self._metrics}
        self._done = {task for task in state_dict["done"] if task in self._metrics}
        self._last = {task for task in state_dict["last"] if task in self._done}
        self._rest()
