"""What went wrong on devices before, each by its smallest input; called in the process that has the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.monitors.base import Monitor, guarding, turn_off_if_slow
from lightning_mtl.training.snapshots import Snapshot
from lightning_mtl.weighting import GradNorm
from tests.devices.build import NAME
from tests.devices.fits import _compare
from tests.devices.machine import trainer_on
from tests.small import batch, small
from tests.training import loader

FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)


class Constant(MultiTaskModule):
    """The loss of one task, and a penalty, are numbers of the CPU."""

    def task_losses(self, batch: Any) -> Any:
        inputs, targets = batch
        return {"a": mse_loss(self.heads["a"](self.trunk(inputs)), targets["a"]), "b": torch.tensor(0.0)}

    def penalties(self) -> dict[str, Tensor]:
        return {"none": torch.tensor(0.0)}


def constant_losses() -> None:
    """A constant that forgets the device trains as it does on the CPU."""
    _compare(lambda: (small(("a", "b"), Constant), [GradNorm(at="trunk")]), absent=False)


class OverTwo(MultiTaskModule):
    """A part of the trunk, and a head, on a second device."""

    second = "cpu"

    def on_fit_start(self) -> None:
        for part in (self.trunk.get_submodule("2"), self.heads["b"]):
            part.to(self.second)

    def task_losses(self, batch: Any) -> Any:
        inputs, targets = batch
        z = torch.tanh(self.trunk.get_submodule("0")(inputs)).to(self.second)
        z = torch.tanh(self.trunk.get_submodule("2")(z))
        b = mse_loss(self.heads["b"](z), targets["b"].to(self.second))
        return {"a": mse_loss(self.heads["a"](z.to(self.device)), targets["a"]), "b": b}


def several_devices(weighting: type[Any]) -> None:
    """Rows over two devices are measured, summed and combined as on one."""
    found = {}
    for kind, second in (("cpu", "cpu"), (NAME, f"{NAME}:1")):
        module = small(("a", "b"), type("OverTwo", (OverTwo,), {"second": second}))
        trainer = trainer_on(kind, callbacks=[weighting(at="trunk")])
        trainer.fit(module, loader(*[batch(6, seed) for seed in range(4)]))
        found[kind] = torch.cat([p.detach().cpu().flatten() for p in module.parameters()])
    torch.testing.assert_close(found[NAME], found["cpu"])  # sums over two blocks are not those over one, to the bit


def rows_over_devices() -> None:
    """Products and norms of blocks on several devices."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, n, generator=generator) for n in (5, 7)]
    rows = Rows([torch.zeros(5, device=FIRST), torch.zeros(7, device=SECOND)], 2)
    for row in range(2):
        rows.add(row, [values[0][row].to(FIRST), values[1][row].to(SECOND)])
    whole = torch.cat(values, dim=1).double()
    torch.testing.assert_close(rows.gramian(), whole @ whole.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.norms().cpu().double(), whole.norm(dim=1), rtol=1e-6, atol=1e-6)


def random_states() -> list[Any]:
    """Which devices are asked for their random state by a snapshot of a module on the second one."""
    states: list[Any] = torch.get_device_module(NAME).asked_states
    states.clear()
    Snapshot(nn.Linear(1, 1), SECOND)
    return [str(state) for state in states]


def queued_work_is_no_monitors() -> None:
    """A monitor that seems slow on a device is measured again, without what the device had queued, and then judged."""
    monitor = Monitor()
    monitor._began, monitor._spent = 0.0, 1e9
    turn_off_if_slow(monitor, FIRST)
    assert not monitor.off
    assert monitor._spent == 0.0
    with guarding([monitor], FIRST):
        pass
    monitor._began, monitor._spent = 0.0, 1e9
    with pytest.warns(UserWarning, match="turned off"):
        turn_off_if_slow(monitor, FIRST)
    assert monitor.off


def mixtures_are_seen() -> None:
    """The device itself: what a GPU would refuse, it refuses, in a backward pass as well."""
    here, there = torch.ones(2, device=FIRST, requires_grad=True), torch.ones(2)
    trials: tuple[Callable[[], Any], ...] = (
        lambda: here + there,
        lambda: torch.stack([here, there]),
        lambda: here + torch.ones(2, device=SECOND),
        lambda: torch.stack([here.sum(), torch.zeros(())]),
    )
    for wrong in trials:
        with pytest.raises(RuntimeError, match=r"mixes|same device"):
            wrong()
    (here * 2 + torch.tensor(1.0)).sum().backward()
    assert here.grad is not None
    assert here.grad.device == FIRST
