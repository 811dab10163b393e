"""Two processes with half of each batch follow one process with all of it, whatever weighs and whoever has labels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.data import TASKS, Faces, batches
from tests.distributed.pairs import RANKS, Pair
from tests.distributed.table import Case, cases, parameters
from tests.distributed.worker import train, train_on_rank

pytestmark = [
    pytest.mark.filterwarnings("ignore:Step \\d+ is skipped:UserWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
]
TOLERANCE = 1e-5


@functools.cache
def alone(name: str) -> dict[str, Any]:
    """What one process makes of a case."""
    return train(cases("default")[name], "single")


@pytest.mark.parametrize(("flavour", "name"), parameters())
def test_two_processes_follow_one(flavour: str, name: str, pair: Pair) -> None:
    ranks = pair.run(train_on_rank, flavour, name)
    found = [*complaints(cases(flavour)[name], ranks, alone(name))]
    assert not found, "\n".join(found)


def test_buffers_are_those_of_automatic_optimization(pair: Pair) -> None:
    names = [name for name in cases("default") if name.startswith("buffers")]
    trained = {name: pair.run(train_on_rank, "default", name) for name in names}
    found = [*buffer_complaints([{name: trained[name][rank] for name in names} for rank in range(RANKS)])]
    assert not found, "\n".join(found)


def complaints(case: Case, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> Iterator[str]:
    """What is not as it should be: ranks that differ at all, a rank that differs from one process."""
    first, *others = ranks
    alike = ["parameters", "weights", "state", "metrics", "steps", "ungraded"]
    for other in others:
        yield from (f"the ranks differ in {key}" for key in alike if not _all_close(first[key], other[key], 0.0))
    if not torch.isfinite(first["parameters"]).all():
        yield "parameters are not finite"
    if case.trunk == "batch norm":  # each rank normalizes by its own samples
        return
    if alone["steps"] < 6:
        yield f"{alone['steps']} steps are too few"
    compared = ["parameters", "weights", "state", "steps"]
    # Means over an epoch count samples, or leave out what is not finite, on each rank.
    compared += ["metrics"] if case.pattern in ("complete", "counted") and case.module is Faces else []
    for key in compared:
        if not _all_close(first[key], alone[key], TOLERANCE):
            yield f"{key} are not those of one process, but {_distance(first[key], alone[key]):.0e} away"
    if case.module is Faces and not case.arguments:  # a step of its own for every batch
        for name, trained in (("one process", alone), ("the ranks", first)):
            wrong = [step for step, tasks in enumerate(trained["ungraded"]) if tasks != _nobody_has(case, step)]
            if wrong:
                yield f"in {name}, heads without a label have gradients, or others none, in the steps {wrong}"


def buffer_complaints(ranks: list[dict[str, Any]]) -> Iterator[str]:
    """Where BatchNorm's running means are not what automatic optimization makes them, step by step on each rank."""
    for rank, trained in enumerate(ranks):
        for window in ("", ", accumulated"):
            expected = trained[f"buffers, automatic{window}"]["buffers"]
            if not _all_close(trained[f"buffers, manual{window}"]["buffers"], expected, 1e-12):
                yield f"rank {rank}: buffers{window} differ from automatic optimization's"
            # Other weights train another model, whose buffers still have to agree when they are broadcast.
            differ = [
                [
                    not torch.equal(ours, theirs)
                    for ours, theirs in zip(*(r[name]["buffers"] for r in ranks), strict=True)
                ]
                for name in (f"buffers, automatic{window}", f"buffers of rows{window}")
            ]
            if differ[0] != differ[1]:
                yield f"buffers of rows{window} are not broadcast when automatic optimization's are"


def _nobody_has(case: Case, step: int) -> list[str]:
    part = batches(case.batches, case.pattern)[step % case.batches]
    return [task for task in TASKS if not part.labeled[task].any()]


def _all_close(ours: Any, theirs: Any, tolerance: float) -> bool:
    return _distance(ours, theirs) <= tolerance


def _distance(ours: Any, theirs: Any) -> float:
    """The largest difference between two nested structures of numbers; infinite where their form differs."""
    if isinstance(ours, dict) and ours.keys() == theirs.keys():
        return max([_distance(ours[key], theirs[key]) for key in ours], default=0.0)
    if isinstance(ours, Tensor) and ours.shape == theirs.shape:
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return torch.inf
        difference = (ours.double() - theirs.double()).nan_to_num(0.0).abs()
        return float(difference.max()) if difference.numel() else 0.0
    if isinstance(ours, float | int):
        return 0.0 if ours == theirs or (ours != ours and theirs != theirs) else abs(ours - theirs)
    return 0.0 if isinstance(ours, list) and ours == theirs else torch.inf
