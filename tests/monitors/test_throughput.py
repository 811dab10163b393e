"""Shares of a step add up, belong to the right phase, and are taken in the steps asked for alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import Signals, Weighting
from lightning_mtl.monitors import Throughput, throughput
from lightning_mtl.monitors.throughput import Phases
from tests.small import batch, batches, small
from tests.training import Memory, fit, loader


class Thinks(Weighting):
    """Takes its time."""

    def weigh(self, signals: Signals) -> Tensor:
        time.sleep(0.2)
        return torch.ones_like(signals.losses)


class Tarries:
    """A loader that is waited for."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for index in range(3):
            time.sleep(0.2 * (index > 0))
            yield batch()


def test_time_counts_where_it_is_spent() -> None:
    solving, data = Throughput(1), Throughput(2)
    fit(small(), loader(*batches(4, 4, 4)), callbacks=[solving, Thinks()])
    assert max(solving.shares, key=lambda phase: solving.shares[phase]) == "solving"
    fit(small(), Tarries(), callbacks=[data])
    assert max(data.shares, key=lambda phase: data.shares[phase]) == "data"
    for monitor in (solving, data):
        assert sum(monitor.shares.values()) == pytest.approx(1.0)
        assert set(monitor.shares) == set(throughput.PHASES)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_step_of_n_is_logged(accumulate: int) -> None:
    memory = Memory()
    data = batches(*[4] * 8)
    fit(small(accumulate_grad_batches=accumulate), loader(*data), callbacks=[Throughput(2)], logger=memory)
    lines = [line for _, line in memory.lines if "throughput/rest" in line]
    assert len(lines) == 4 // accumulate
    assert "throughput/steps_per_second" not in lines[0]
    assert all(line["throughput/steps_per_second"] > 0 for line in lines[1:])


def test_a_phase_within_a_phase_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    phases = Phases()
    with phases.during("unheard"):
        pass
    phases.listen(torch.device("cpu"))
    with phases.during("outer"), phases.during("inner"):
        pass
    assert phases.stop() == {"rest": 1.0 + 5.0, "outer": 2.0 + 4.0, "inner": 3.0}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0\) must be at least 1"):
        Throughput(0)
