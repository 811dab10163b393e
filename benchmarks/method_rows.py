"""Rows of ``do_methods_work.py``: each method with what its paper, or its code, has as a default, and the setup."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import lightning.pytorch as pl

from benchmarks.real_problems import Loader, Problem
from lightning_mtl import Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.tuning import Setup

VALIDATIONS = 24  # in a training, evenly over its steps: DTP reads them
MakeWeighting = Callable[[Problem], Weighting]


def takes_no_argument(method: type[Weighting]) -> bool:
    """Whether a method can be constructed as it is."""
    given = inspect.signature(method).parameters.values()
    return all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in given)


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
# What these data do not have.
LEFT_OUT = {
    "AuxiliaryCosine": "it tells main tasks from auxiliary ones, and here all are main ones",
    "MetaBalance": "it tells main tasks from auxiliary ones, and here all are main ones",
    "NTKWeighting": "it weighs residuals of a physics-informed loss, and these tasks are classified",
    "PIVRG": "it reads how far each task is from a baseline on validation data, and the tasks have none",
}


def _plain(name: str) -> MakeWeighting:
    return lambda _: getattr(methods, name)()


# Every other method that can be constructed without arguments; fixed weights have a row of their own.
REST: dict[str, MakeWeighting] = _WITH_ARGUMENTS | {
    name: _plain(name)
    for name in sorted(set(methods.__all__) - {*NAMED, *_WITH_ARGUMENTS, *LEFT_OUT, "StaticWeights"})
    if takes_no_argument(getattr(methods, name))
}


def made_for(problem: Problem, wanted: Mapping[str, MakeWeighting]) -> dict[str, Callable[[], Weighting]]:
    """Return functions without arguments, as ``compare`` takes them."""
    return {name: functools.partial(make, problem) for name, make in wanted.items()}


def setup_of(problem: Problem) -> Setup:
    """Return what all rows train on: the problem's model, data and budget."""
    fold, steps = problem.fold, problem.steps

    def data(seed: int) -> tuple[Loader, ...]:
        own = fold(seed)
        return own.train, own.val, own.test

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=max(1, steps // VALIDATIONS),
            check_val_every_n_epoch=None,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        )

    return Setup(model=problem.model, data=data, trainer=trainer, lr=problem.learning_rates[0])
