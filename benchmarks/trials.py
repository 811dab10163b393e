"""Trainings of ``do_methods_work.py``: one of them, a learning rate's choice, and all that a row of its table needs."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.real_problems import Problem
from lightning_mtl import Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.transfer import only_tasks, task_scores

VALIDATIONS = 24  # in a training, evenly over its steps
MakeWeighting = Callable[[Problem], Weighting | None]


@dataclass(frozen=True)
class Trial:
    """One training: its metric on validation data over the steps, on test data in the end, and its cost."""

    curve: dict[int, dict[str, float]]  # {step: {task: metric}}, on validation data
    test: dict[str, float]
    step_seconds: float  # median, of processor time

    @property
    def validated(self) -> float:
        """The mean over the tasks on validation data after the last step."""
        return statistics.mean(self.curve[max(self.curve)].values())


class Watch(pl.Callback):
    """Keeps the validation metrics, and the processor time from each step's beginning to the next one's."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.curve: dict[int, dict[str, float]] = {}
        self.began: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401 - Lightning's
        self.began.append(time.process_time())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scores = task_scores(trainer)
        self.curve[trainer.global_step] = {task: found[self.metric] for task, found in scores.items()}

    def step_seconds(self) -> float:
        return statistics.median(after - before for before, after in zip(self.began, self.began[1:], strict=False))


def train(problem: Problem, weighting: Weighting | None, *, lr: float, seed: int, task: str | None = None) -> Trial:
    """Train one model, of one task where it is named, with the problem's budget."""
    fold, watch = problem.fold(seed), Watch(problem.metric)
    torch.manual_seed(seed)
    module = problem.model(lr)
    model = only_tasks(module, problem.tasks if task is None else [task])
    trainer = pl.Trainer(
        max_steps=problem.steps,
        max_epochs=-1,
        val_check_interval=max(1, problem.steps // VALIDATIONS),
        check_val_every_n_epoch=None,
        callbacks=[watch] if weighting is None else [weighting, watch],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(seed)  # once more: the data come in the same order whatever the model drew
    trainer.fit(model, fold.train, fold.val)
    if problem.steps not in watch.curve:
        trainer.validate(model, fold.val, verbose=False)
    trainer.test(model, fold.test, verbose=False)
    tested = task_scores(trainer, "test")
    return Trial(watch.curve, {task: found[problem.metric] for task, found in tested.items()}, watch.step_seconds())


@dataclass(frozen=True)
class Method:
    """A row: its name, and its weightings to choose from, most have one; ``task`` names a model of one task."""

    name: str
    makes: Mapping[str, MakeWeighting]
    task: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What validation data chose for a row, and the trainings of all seeds with it."""

    lr: float
    choice: str
    trials: dict[int, Trial]  # {seed: its training}
    searched: dict[str, float]  # {what was tried: its mean metric on validation data}


def tune(problem: Problem, method: Method, *, tuning_seeds: Sequence[int], told: Callable[[], None]) -> Tuned:
    """Choose by the mean metric of all tasks on validation data at the end, over the seeds for tuning."""
    found: dict[tuple[str, float], dict[int, Trial]] = {}
    for choice, make in method.makes.items():
        for lr in problem.learning_rates:
            found[choice, lr] = {}
            for seed in tuning_seeds:
                found[choice, lr][seed] = train(problem, make(problem), lr=lr, seed=seed, task=method.task)
                told()
    validated = {key: statistics.mean(trial.validated for trial in trials.values()) for key, trials in found.items()}
    choice, lr = max(validated, key=validated.__getitem__)
    searched = {f"{name} lr={lr:g}".strip(): value for (name, lr), value in validated.items()}
    return Tuned(lr, choice, found[choice, lr], searched)


def complete(problem: Problem, method: Method, tuned: Tuned, seed: int) -> None:
    """Train the chosen with one more seed, unless the search has."""
    if seed not in tuned.trials:
        weighting = method.makes[tuned.choice](problem)
        tuned.trials[seed] = train(problem, weighting, lr=tuned.lr, seed=seed, task=method.task)


def takes_no_argument(method: type[Weighting]) -> bool:
    """Whether a method can be constructed as it is."""
    given = inspect.signature(method).parameters.values()
    return all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in given)


EQUAL, STATIC, SINGLE = "equal weights", "static weights, tuned", "single task"
# Each with what its paper, or its code, has as a default.
NAMED: dict[str, MakeWeighting] = {
    "UncertaintyWeighting": lambda p: methods.UncertaintyWeighting(dict.fromkeys(p.tasks, "classification")),
    "DWA": lambda _: methods.DWA(),
    "GradNorm": lambda _: methods.GradNorm(),
    "FAMO": lambda _: methods.FAMO(),
    "MGDA": lambda _: methods.MGDA(),
    "MGDA at features": lambda _: methods.MGDA(at="features"),
    "PCGrad": lambda _: methods.PCGrad(),
    "CAGrad": lambda _: methods.CAGrad(),
    "IMTLG": lambda _: methods.IMTLG(),
    "NashMTL": lambda _: methods.NashMTL(),
    "UPGrad": lambda _: methods.UPGrad(),
}
_WITH_ARGUMENTS: dict[str, MakeWeighting] = {
    "CRMOGM of MGDA": lambda _: methods.CRMOGM(methods.MGDA()),
    "DTP": lambda p: methods.DTP(p.metric),
    "STCH": lambda _: methods.STCH(warmup_epochs=2),  # of about six; the paper's warm-up would be most of the budget
}


def _plain(name: str) -> MakeWeighting:
    return lambda _: getattr(methods, name)()


# Every other method that can be constructed without arguments and needs no residuals; fixed weights have a row that is
# tuned.
REST: dict[str, MakeWeighting] = _WITH_ARGUMENTS | {
    name: _plain(name)
    for name in sorted(
        set(methods.__all__) - {*NAMED, *_WITH_ARGUMENTS, "StaticWeights", "NTKWeighting"}
    )  # no residuals
    if takes_no_argument(getattr(methods, name))
}


def shared_methods(problem: Problem, wanted: Mapping[str, MakeWeighting]) -> list[Method]:
    """The rows of models that learn all tasks at once."""
    return [
        Method(EQUAL, {"": lambda _: None}),
        Method(STATIC, static_grid(problem.tasks)),
        *(Method(name, {"": make}) for name, make in wanted.items()),
    ]


def static_grid(tasks: Sequence[str]) -> dict[str, MakeWeighting]:
    """Five sets of fixed weights that add up to K, equal ones first: a line for two tasks, else four random draws."""
    if len(tasks) == 2:
        shares = [[share, 1 - share] for share in (0.5, 0.25, 0.4, 0.6, 0.75)]
    else:
        generator = torch.Generator().manual_seed(0)
        draws = 4.0 ** (torch.rand(4, len(tasks), generator=generator) - 0.5)  # from a half to twice
        shares = [[1 / len(tasks)] * len(tasks), *(draws / draws.sum(dim=1, keepdim=True)).tolist()]
    found: dict[str, MakeWeighting] = {}
    for share in shares:
        weights = {task: len(tasks) * part for task, part in zip(tasks, share, strict=True)}
        label = " ".join(f"{weight:.2f}" for weight in weights.values())
        found[label] = functools.partial(_static, weights)
    return found


def _static(weights: Mapping[str, float], _: Problem) -> Weighting:
    return methods.StaticWeights(weights)
