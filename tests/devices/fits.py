"""Fits on the second device, called in the process that has it: beside the CPU's, counted, or without float64."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import LTB, MLP, Branching, CrossStitch, DSelectK, MMoE, SoftSharing
from lightning_mtl.devices import WITHOUT_FLOAT64
from lightning_mtl.learning_rates import GradientNorm, Importance, Relatedness, TaskLearningRate
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity
from lightning_mtl.weighting import MGDA, GradNorm, UncertaintyWeighting
from tests.contract import label
from tests.contract_rows import MAKES
from tests.devices.build import NAME
from tests.devices.machine import KINDS, ScalerAlone, trainer_on
from tests.devices.waits import CountIn, NoFloat64, Waits
from tests.small import Batch, batch, binary
from tests.training import Memory, Steps, flat_parameters, loader

TASKS = ("a", "b", "c")


def batches(*, absent: bool) -> list[Batch]:
    """Six batches; with ``absent``, two of them lack a task, and one has a single one."""
    found = [batch(6, seed, TASKS) for seed in range(6)]
    lacking = {1: ("b",), 2: ("a", "c"), 4: ("b",)} if absent else {}
    return [(x, {k: y for k, y in own.items() if k not in lacking.get(i, ())}) for i, (x, own) in enumerate(found)]


def trained(
    kind: str,
    module: MultiTaskModule,
    callbacks: Sequence[pl.Callback],
    *,
    absent: bool = True,
    scaler: bool = False,
    mode: Any = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """The parameters after two epochs, with what the CPU made of them, and what was logged."""
    logger = Memory()
    trainer = trainer_on(
        kind,
        callbacks=list(callbacks),
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        plugins=[ScalerAlone(kind)] if scaler else None,
    )
    data = loader(*batches(absent=absent))
    with nullcontext() if mode is None else mode:
        trainer.fit(module, data, loader(*batches(absent=False)))
    logged = [{name: float(value) for name, value in line.items()} for _, line in logger.lines]
    return flat_parameters(module.cpu()), logged


def _compare(make: Callable[[], tuple[MultiTaskModule, list[pl.Callback]]], **arguments: Any) -> None:
    """Train twice; the device's parameters must be the CPU's to the bit, and its figures but for rounding.

    (The norms of rows that a method combines are logged alone, and computed in float64 on a device.)
    """
    found = {}
    for kind in KINDS:
        module, callbacks = make()
        found[kind] = trained(kind, module, callbacks, **arguments)
    torch.testing.assert_close(found[NAME][0], found["cpu"][0], rtol=0, atol=0)
    for logged, expected in zip(found[NAME][1], found["cpu"][1], strict=True):
        assert logged == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert found["cpu"][0].isfinite().all()


def method(index: int) -> None:
    """One row of the contract's table, with tasks that are absent."""
    _compare(lambda: (binary(tasks=TASKS), [MAKES[index](), Steps()]))


def accumulated(index: int) -> None:
    """The same over two micro-batches a step, with a scaler and clipping."""
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    _compare(lambda: (binary(tasks=TASKS, **settings), [MAKES[index]()]), scaler=True)


BESIDE: dict[str, Callable[[], list[pl.Callback]]] = {
    "conflict": lambda: [UncertaintyWeighting(), GradientConflict(1, figure=False)],
    "conflict of the weighting": lambda: [MGDA(at="features"), GradientConflict(1, at="features", figure=False)],
    "affinity": lambda: [TaskAffinity(2, figure=False), Convergence(every_n_steps=1)],
    "exact affinity": lambda: [TaskAffinity(2, exact=True, lr=0.1, figure=False)],
    "norms of heads": lambda: [TaskLearningRate([GradientNorm(), Importance({"a": 0.5})], shares_trunk=True)],
    "shared norms": lambda: [GradNorm(), TaskLearningRate(GradientNorm(of="shared"), normalize=True)],
    "cosines": lambda: [MGDA(), TaskLearningRate(Relatedness("gradient_cosine"), shares_trunk=True)],
    "targets": lambda: [TaskLearningRate(Relatedness("target_correlation", samples=20))],
    "predictions": lambda: [TaskLearningRate(Relatedness("prediction_mutual_information"))],
    "lags": lambda: [TaskLearningRate(Importance(metric="accuracy"), every_n_steps=2)],
}


def beside(name: str) -> None:
    """Monitors and learning rates."""
    _compare(lambda: (binary(tasks=TASKS), BESIDE[name]()))


def _branch() -> MLP:
    return MLP([3, 4, 4])


TRUNKS: dict[str, Callable[[], Any]] = {
    "MMoE": lambda: MMoE(_branch, TASKS, 3, num_experts=2),
    "DSelectK": lambda: DSelectK(_branch, TASKS, gate=3, num_experts=4),
    "CrossStitch": lambda: CrossStitch(_branch(), TASKS, after=[1]),
    "LTB": lambda: LTB([[_branch()], [MLP([4, 4]), MLP([4, 4])]], TASKS),
    "SoftSharing": lambda: SoftSharing(_branch(), TASKS, penalty="trace_norm", strength=0.1),
    "wide": lambda: MLP([3, 64, 64, 4]),  # wider than a batch is long: its gradients are measured in fewer numbers
    "compiled": lambda: torch.compile(_branch(), backend="aot_eager"),
}


def architecture(name: str) -> None:
    """A trunk of the package, and one that is compiled."""

    def make() -> tuple[MultiTaskModule, list[pl.Callback]]:
        module = binary(tasks=TASKS)
        torch.manual_seed(3)
        module.trunk = TRUNKS[name]()
        weighting = MGDA(at="features") if name == "compiled" else MGDA()
        return module, [weighting, *([Branching()] if name == "LTB" else [])]

    _compare(make)


# How often the host waits


def _partly_labeled(**settings: Any) -> MultiTaskModule:
    module = binary(tasks=TASKS, **settings)
    module.tasks = {task: Task(mse_loss, missing=torch.nan) for task in TASKS}
    return module


def _wide() -> MultiTaskModule:
    module = binary(tasks=TASKS)
    module.trunk = TRUNKS["wide"]()
    return module


def _plain(make: Callable[[], Any]) -> tuple[MultiTaskModule, list[pl.Callback]]:
    return binary(tasks=TASKS), [make()]


COUNTED: dict[str, Callable[[], tuple[MultiTaskModule, list[pl.Callback]]]] = {
    "no weighting": lambda: (binary(tasks=TASKS), []),
    # Of those that have one label, the first is taken.
    **{label(make): functools.partial(_plain, make) for make in reversed(MAKES)},
    "UncertaintyWeighting with importance": lambda: (
        binary(tasks=TASKS),
        [UncertaintyWeighting(importance={"a": 2.0})],
    ),
    "wide trunk, MGDA": lambda: (_wide(), [MGDA()]),
    "GradNorm at the features": lambda: (binary(tasks=TASKS), [GradNorm(at="features")]),
    "GradNorm at the trunk": lambda: (binary(tasks=TASKS), [GradNorm(at="trunk")]),
    "labels missing as NaN": lambda: (_partly_labeled(), []),
    "two micro-batches": lambda: (binary(tasks=TASKS, accumulate_grad_batches=2), []),
    "two micro-batches, MGDA": lambda: (binary(tasks=TASKS, accumulate_grad_batches=2), [MGDA()]),
    "scaler and clipping, MGDA": lambda: (binary(tasks=TASKS, gradient_clip_val=1.0), [MGDA()]),
    "GradientConflict beside": lambda: (binary(tasks=TASKS), [GradientConflict(1, figure=False)]),
    "rates": lambda: (binary(tasks=TASKS), [TaskLearningRate(GradientNorm(), shares_trunk=True)]),
    "clipping": lambda: (binary(tasks=TASKS, gradient_clip_val=1.0), []),
}


def counts(names: Sequence[str], absent: bool = False, logged: bool = False) -> dict[str, Counter[str]]:
    """Where the host waits in one optimizer step of these fits, in none of the first steps, which look at more."""
    return {name: _counted(name, absent=absent, logged=logged) for name in names}


def _counted(name: str, *, absent: bool, logged: bool) -> Counter[str]:
    module, callbacks = COUNTED[name]()
    module.train_task_metrics.clear()  # torchmetrics reads what it checks
    size = module.accumulate_grad_batches
    waits = Waits(counting=False)
    trainer = trainer_on(
        NAME,
        callbacks=[CountIn(waits, range(4, 4 + size)), *callbacks],
        limit_train_batches=4 + size,
        limit_val_batches=int(name.startswith("DTP")),  # which refuses a fit without
        max_epochs=1,
        logger=Memory() if logged else False,
        log_every_n_steps=1 if logged else 1000,
        plugins=[ScalerAlone(NAME)] if name.startswith("scaler") else None,
    )
    with waits:
        trainer.fit(module, loader(*batches(absent=absent)), loader(*batches(absent=False)))
    return waits.found


def waits_of_each_kind() -> list[tuple[str, int]]:
    """What the counter makes of operations of which it is known whether they wait."""
    device = torch.device(NAME, 0)
    x, mask = torch.arange(4.0).to(device), torch.tensor([True, False, True, False]).to(device)
    trials: dict[str, Callable[[], Any]] = {
        "float": lambda: float(x.sum()),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "nonzero": x.nonzero,
        "a mask": lambda: x[mask],
        "a list": lambda: x[[0, 2]],
        "torch.tensor": lambda: torch.tensor([1.0], device=device),
        "new_tensor": lambda: x.new_tensor([1.0]),
        "to": lambda: torch.ones(2).to(device),
        "to, not blocking": lambda: torch.ones(2).to(device, non_blocking=True),
        "torch.full": lambda: torch.full((2,), 3.0, device=device),
        "arithmetic": lambda: x * 2 + x,
        "an index there": lambda: x[mask.long()],
    }
    found = []
    for name, trial in trials.items():
        with Waits() as waits:
            trial()
        found.append((name, waits.found.total()))
    return found


# Without float64, as on MPS


def without_float64(name: str) -> None:
    """A fit whose device refuses float64, with absent tasks, validation and logging."""
    module, callbacks = COUNTED[name]() if name in COUNTED else (binary(tasks=TASKS), [])
    if name in BESIDE:
        callbacks = BESIDE[name]()
    if name == "SoftSharing":
        module.trunk = TRUNKS[name]()
    WITHOUT_FLOAT64.add(NAME)
    try:
        parameters, _ = trained(NAME, module, callbacks, mode=NoFloat64())
    finally:
        WITHOUT_FLOAT64.discard(NAME)
    assert parameters.isfinite().all()
