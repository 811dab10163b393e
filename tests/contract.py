"""What a weighting owes: the form of a row in the contract's table, and a way to run a weighting without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import Aggregator, Signals, Weighting

J1 = ((-4.0, 1.0, 1.0), (6.0, 1.0, 1.0))
J2 = ((1.0, 2.0, 3.0), (-2.0, 1.0, 0.5), (0.3, -1.0, 2.0))


@dataclass(frozen=True)
class Golden:
    """A state, what is measured, and the weights that must come out.

    Attributes:
        weights: ``[K]``.
        losses: ``[K]``; ones if not given.
        rows: The Jacobian.
        state: States set before, by name.
    """

    weights: Sequence[float]
    losses: Sequence[float] | None = None
    rows: Sequence[Sequence[float]] | None = None
    state: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One weighting under one setting.

    Attributes:
        name: The class's name.
        make: A constructor without arguments.
        measures: What the class must declare.
        weighs_heads: The column "heads" of the literature.
        required: Positional arguments without which the class cannot be constructed.
        total: What the weights sum to, if anything: ``"K"`` or a number.
        unique: Whether the weights of identical tasks are determined, and not their sum alone; None where a twin
            changes the other tasks' weights, too.
        equivariant: Whether permuting the tasks permutes the weights; not where chance puts them in order.
        by_name: Whether an argument names tasks, so that permuting them means something else.
        lowest: A bound from below that the weights keep.
        fits: Whether any module with these tasks can be trained with it.
        golden: Exact values.
    """

    name: str
    make: Callable[[], Weighting]
    measures: str = "losses"
    weighs_heads: bool = True
    required: tuple[Any, ...] = ()
    total: str | float | None = None
    unique: bool | None = True
    equivariant: bool = True
    by_name: bool = False
    lowest: float = 0.0
    fits: bool = True
    golden: tuple[Golden, ...] = ()

    @property
    def label(self) -> str:
        return label(self.make)


def reach(weighting: Weighting) -> Hashable:
    """How a weighting reaches the gradients: of two that agree in this, a test of the engine needs one."""
    return weighting.measures, weighting.at, weighting.weighs_heads, isinstance(weighting, Aggregator)


def habits(weighting: Weighting) -> Hashable:
    """The same with the hooks of Lightning that the class has of its own."""
    classes = type(weighting).__mro__[: type(weighting).__mro__.index(Weighting)]
    return reach(weighting), frozenset(name for cls in classes for name in vars(cls) if name.startswith("on_"))


def memory(weighting: Weighting) -> Hashable:
    """The same with the names of its states, for tests of what is saved and restored."""
    return habits(weighting), tuple(sorted(weighting.state_dict()["state"]))


def one_of_each(makes: Iterable[Callable[[], Weighting]], kind: Callable[[Weighting], Hashable]) -> list[Any]:
    """Parameters: the first constructor of each kind; the other ones run with the slow tests."""
    seen: set[Hashable] = set()
    found = []
    for make in makes:
        key = kind(make())
        found.append(pytest.param(make, id=label(make), marks=[pytest.mark.slow] if key in seen else []))
        seen.add(key)
    return found


def label(make: Callable[[], Weighting]) -> str:
    """A weighting's name and its arguments."""
    arguments = getattr(make, "keywords", {})
    return "-".join([type(make()).__name__, *(f"{name}={value}" for name, value in arguments.items())])


def names(num_tasks: int) -> tuple[str, ...]:
    return tuple("abcdefghij"[:num_tasks])


def signals(
    losses: Tensor,
    rows: Tensor | None = None,
    *,
    step: int = 0,
    epoch: int = 0,
    scores: Tensor | None = None,
    tasks: Sequence[str] | None = None,
) -> Signals:
    """What a module would say; norms, Gramian and, for want of residuals, kernel traces are those of ``rows``."""
    gramian = None if rows is None else rows.double() @ rows.double().T
    norms = None if gramian is None else gramian.diagonal().sqrt()
    tasks = names(len(losses)) if tasks is None else tuple(tasks)
    traces = None if gramian is None else gramian.diagonal()
    return Signals(tuple(tasks), losses, step, epoch, norms=norms, gramian=gramian, scores=scores, traces=traces)


def ask(weighting: Weighting, given: Signals) -> Tensor:
    """One step as a module takes it: weights first, the state after."""
    present = [weighting.tasks.index(task) for task in given.tasks]
    weights = weighting.current_weights(given, present, measured=weighting.measures_in(given.step))
    weighting.observe(given, present)
    return weights


def course(
    num_tasks: int, steps: int = 6, *, seed: int = 0, loss_scale: Any = 1.0, gradient_scale: Any = 1.0
) -> list[Signals]:
    """Random measurements of a few steps, two an epoch; the scales are numbers, or one for each task."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        losses = torch.rand(num_tasks, generator=generator, dtype=torch.float64) + 0.1
        rows = torch.randn(num_tasks, 12, generator=generator, dtype=torch.float64)
        scores = torch.rand(num_tasks, generator=generator)
        losses = (losses * torch.as_tensor(loss_scale, dtype=torch.float64)).float()
        rows = rows * torch.as_tensor(gradient_scale, dtype=torch.float64).expand(num_tasks)[:, None]
        found.append(signals(losses, rows, step=step, epoch=step // 2, scores=scores))
    return found


def run(weighting: Weighting, steps: Sequence[Signals], tasks: Sequence[str]) -> Tensor:
    """The weights of all steps, ``[steps, K]``, from a fresh state."""
    weighting.reset(list(tasks))
    return torch.stack([ask(weighting, given) for given in steps])


def direction_of(aggregator: Aggregator, given: Signals, rows: torch.Tensor) -> torch.Tensor:
    """The direction that an aggregator makes of rows in one matrix, as the training step asks for it."""
    directions = aggregator.decide(given, range(len(rows)), measured=True, rows=[rows]).directions
    assert directions is not None
    return directions[0]
