"""Statistics of targets and scales of losses on two processes: those of all samples, and one training."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, StackDataset

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.weighting import MGDA
from tests.distributed.pairs import Pair
from tests.distributed.table import DDP
from tests.small import heads, trunk
from tests.training import flat_parameters, quiet_trainer

KINDS: dict[str, dict[str, Any]] = {
    "measured": {"standardize": True},
    "running": {"standardize": "running"},
    "scaled": {"loss_scale": "initial"},
    "running scale": {"loss_scale": "running"},
}


def rows_of(inputs: Any, labels: Any) -> Any:
    return StackDataset(inputs, StackDataset(a=inputs[:, :1], b=labels))


def train(rank: int = 0, ranks: int = 1) -> dict[str, list[Any]]:
    """For each kind the parameters, and the statistics that the fit ended with."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 3, generator=generator)
    y = 300 + 35 * torch.randn(24, 1, generator=generator)
    y[[1, 2, 7, 8, 9]] = torch.nan  # the ranks have other numbers of labels
    found = {}
    for name, asked in KINDS.items():
        torch.manual_seed(2)
        tasks = {"a": Task(mse_loss), "b": Task(mse_loss, missing=torch.nan, **asked)}
        module = MultiTaskModule(trunk(), heads(), tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
        module = module.double()
        inputs, labels = x[rank::ranks].double(), y[rank::ranks].double()
        data = DataLoader(rows_of(inputs, labels), 8 // ranks)
        strategy: Any = "auto" if ranks == 1 else DDP()
        trainer = quiet_trainer(
            devices=ranks, strategy=strategy, use_distributed_sampler=False, max_epochs=2, callbacks=[MGDA()]
        )
        trainer.fit(module, data)
        units = module.target_units.of("b")
        scales = module.recorder.scales
        state = [] if units is None else [float(units.mean), float(units.std)]
        state += [] if scales is None else scales.values.tolist()
        found[name] = [flat_parameters(module), state]
    return found


@pytest.mark.filterwarnings("ignore:In the first step the loss of task")
def test_two_processes_follow_one(pair: Pair) -> None:
    alone, (first, second) = train(), pair.run(train)
    for name, (parameters, state) in alone.items():
        assert first[name][1] == second[name][1] == pytest.approx(state, rel=1e-6)
        assert torch.equal(first[name][0], second[name][0]), name
        torch.testing.assert_close(first[name][0], parameters, rtol=1e-6, atol=1e-8, msg=name)
