"""Whatever comes in: a right result or a clear error, and never a number in a parameter that is none."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradNorm, NashMTL, PCGrad, UncertaintyWeighting, UPGrad
from tests.contract import Row, ask, signals
from tests.contract_rows import ROWS
from tests.small import batch, small
from tests.training import fit, flat_parameters, loader

# What is tried here are losses and gradients of every size, of which some warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In the first step the loss of task:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning"),
]


def examples(number: int) -> settings:
    """So many, the same in every run, in as much time as they take."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


# By the seeds of generators below, hypothesis decides on what matters: sizes, scales and forms.
seeds = st.integers(0, 2**32 - 1)
exponents = st.integers(-30, 30)


def _scales(draw: Any, num_tasks: int, largest: int = 30) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All of one size, or of sizes between two extremes, some of them zero."""
    exponent = st.integers(-largest, largest)
    lowest, highest = sorted((draw(exponent), draw(exponent)))
    rng = np.random.default_rng(draw(seeds))
    scales = 10.0 ** rng.uniform(lowest, highest, num_tasks)
    return np.where(rng.random(num_tasks) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), 0.0, scales)


@st.composite
def jacobians(draw: Any, num_tasks: int) -> Tensor:
    """Rows in general position, of any rank, twice the same, opposite, or Pareto-stationary."""
    rng = np.random.default_rng(draw(seeds))
    rank = draw(st.integers(1, num_tasks + 2))
    rows = rng.standard_normal((num_tasks, rank)) @ rng.standard_normal((rank, 70))
    form = draw(st.sampled_from(["general", "duplicates", "opposite", "stationary", "nearly the same"]))
    half = num_tasks // 2
    if form == "duplicates":
        rows[half : 2 * half] = rows[:half]
    elif form == "opposite":
        rows[half : 2 * half] = -rows[:half]
    elif form == "stationary":
        rows -= rows.mean(axis=0)
    elif form == "nearly the same":
        rows = rows[:1] + 1e-9 * rows
    # The Gramian holds their squares: 1e-30 to 1e30.
    return torch.from_numpy(rows * _scales(draw, num_tasks, largest=15)[:, None])


@st.composite
def steps(draw: Any, num_tasks: int) -> tuple[Tensor, Tensor]:
    losses = torch.from_numpy(_scales(draw, num_tasks)).float()
    return losses, draw(jacobians(num_tasks))


def settled(row: Row, num_tasks: int) -> Weighting:
    weighting = row.make()
    weighting.reset(names(row, num_tasks))
    return weighting


def states(weighting: Weighting) -> dict[str, Tensor]:
    """What it remembers, and what the method that it wraps remembers."""
    saved = weighting.state_dict()
    wrapped = {f"wrapped {key}": state for child in saved.get("children", []) for key, state in child["state"].items()}
    return {**saved["state"], **wrapped}


def names(row: Row, num_tasks: int) -> list[str]:
    return (["a", "b", "c"] + [f"task {k}" for k in range(num_tasks)])[:num_tasks]


@pytest.mark.filterwarnings("ignore:FairGrad.*makes the shared gradient:UserWarning")
@examples(100)
@given(st.data())
def test_no_measurement_makes_a_weight_or_a_state_that_is_no_number(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS), label="row")
    num_tasks = data.draw(st.sampled_from([1, 2, 3, 4, 7, 16, 64]), label="tasks")
    weighting = settled(row, num_tasks)
    fresh = states(weighting)
    scores = torch.rand(num_tasks, generator=torch.Generator().manual_seed(data.draw(seeds)))
    for step in range(4):
        losses, rows = data.draw(steps(num_tasks))
        given_signals = signals(
            losses, rows, tasks=names(row, num_tasks), step=step, epoch=step // 2, scores=scores ** (step + 1)
        )
        weights = ask(weighting, given_signals)
        assert weights.shape == (num_tasks,)
        assert torch.isfinite(weights).all(), (row.label, step, losses, weights)
        for key, state in states(weighting).items():  # what is not known yet is nan from the start
            assert torch.isfinite(state[~fresh[key].isnan()]).all(), (row.label, key, state)
            assert not torch.isinf(state).any(), (row.label, key, state)


# Through a training


class Scaled(nn.Module):
    """A loss in any unit."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * mse_loss(prediction, target)


WEIGHTINGS: dict[str, Any] = {
    "no weighting": lambda: None,
    "UncertaintyWeighting": UncertaintyWeighting,
    "GradNorm": GradNorm,
    "MGDA": MGDA,
    "MGDA-UB": lambda: MGDA(at="features"),
    "UPGrad": UPGrad,
    "NashMTL": NashMTL,
    "PCGrad": PCGrad,
}


@examples(20)
@given(
    name=st.sampled_from(sorted(WEIGHTINGS)),
    num_tasks=st.sampled_from([1, 2, 5, 64]),
    extremes=st.tuples(exponents, exponents),
    seed=seeds,
    frozen=st.booleans(),
)
@example(name="MGDA", num_tasks=2, extremes=(30, 30), seed=0, frozen=False)
@example(name="MGDA", num_tasks=2, extremes=(-30, -30), seed=0, frozen=False)
@example(name="NashMTL", num_tasks=64, extremes=(-30, 30), seed=1, frozen=False)
def test_losses_of_any_size_leave_no_parameter_that_is_no_number(
    name: str, num_tasks: int, extremes: tuple[int, int], seed: int, frozen: bool
) -> None:
    tasks = [f"t{k}" for k in range(num_tasks)]
    rng = np.random.default_rng(seed)
    module = small(tasks, optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    for task in tasks:
        module.tasks[task] = Task(Scaled(float(10.0 ** rng.uniform(min(extremes), max(extremes)))))
    module.trunk.get_submodule("0").requires_grad_(not frozen)
    weighting = WEIGHTINGS[name]()
    data = [batch(4, index, tasks) for index in range(3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Step \\d+ is skipped")
        fit(module, loader(*data), callbacks=[] if weighting is None else [weighting])
    assert torch.isfinite(flat_parameters(module)).all()


# Names


ATTRIBUTES = ("forward", "keys", "pop", "items", "training", "trunk", "heads", "tasks", "type", "loss", "_modules")
texts = st.text(min_size=0, max_size=12) | st.sampled_from(
    [
        "a.b",
        "a/b",
        "a b",
        " ",
        "",
        "..",
        "ü",
        "🙂",
        "class",
        "weight",
        "val/loss",
        "total",
        "step=3",
        "{}",
        "__init__",
        *ATTRIBUTES,
    ]
)


@examples(30)
@given(st.lists(texts, min_size=1, max_size=3, unique=True))
@example(["val/loss", "loss", "a b"])
@example(list(ATTRIBUTES))
def test_a_task_of_any_name_trains_or_is_refused_by_name(tasks: list[str]) -> None:
    refused = [
        task
        for task in tasks
        if not task or "." in task or hasattr(nn.ModuleDict(), task) or task.split("/")[0] == "total"
    ]
    if refused:
        with pytest.raises(ValueError, match=re.escape(f"{refused[0]!r} cannot name a task")):
            small(tasks)
        return
    if any(other.startswith(f"{task}/") for task in tasks for other in tasks):
        with pytest.raises(ValueError, match="begins with the name of task"):
            small(tasks)
        return
    module = small(tasks)
    data = batch(4, 1, tasks)
    trainer = fit(module, loader(data), loader(data), callbacks=[GradNorm()])
    assert {f"{prefix}/{task}" for task in tasks for prefix in ("loss", "weight", "val/loss")} <= set(
        trainer.callback_metrics
    )
    assert module.state_dict().keys() == small(tasks).state_dict().keys()


# Targets and batches


def classifier(**arguments: Any) -> MultiTaskModule:
    torch.manual_seed(2)
    return MultiTaskModule(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh()),
        {"kind": nn.Linear(4, 3), "size": nn.Linear(4, 1)},
        {"kind": Task(cross_entropy), "size": Task(mse_loss)},
        **arguments,
    )


def labeled(kinds: Tensor) -> Any:
    return torch.randn(len(kinds), 3), {"kind": kinds, "size": torch.randn(len(kinds), 1)}


@pytest.mark.parametrize("at", ["trunk", "features"])
@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_a_class_that_does_not_exist(wrong: int, at: str) -> None:
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        fit(classifier(), loader(labeled(torch.tensor([0, wrong, 2]))), callbacks=[MGDA(at=at)])


@pytest.mark.filterwarnings("ignore:Step \\d+ is skipped:UserWarning")
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("kinds", [[], [-100, -100]], ids=["no sample", "no label"])
def test_a_mean_over_nothing_takes_no_step(name: str, kinds: list[int]) -> None:
    """Such a mean is not a number; the batches around it train."""
    some, none = labeled(torch.tensor([0, 1, 2])), labeled(torch.tensor(kinds, dtype=torch.long))
    weighting = WEIGHTINGS[name]()
    module = classifier()
    before = flat_parameters(module)
    fit(module, loader(some, none, some), callbacks=[] if weighting is None else [weighting])
    assert torch.isfinite(flat_parameters(module)).all()
    assert not torch.equal(flat_parameters(module), before)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_inputs_that_are_no_numbers(name: str, broken: float) -> None:
    good, bad = labeled(torch.tensor([0, 1, 2])), labeled(torch.tensor([0, 1, 2]))
    bad[0][1, 1] = broken
    bad[1]["size"][0] = broken
    weighting = WEIGHTINGS[name]()
    module = classifier()
    with pytest.warns(UserWarning, match="Step 1 is skipped: the loss of"):
        fit(module, loader(good, bad, good), callbacks=[] if weighting is None else [weighting])
    assert torch.isfinite(flat_parameters(module)).all()
