"""Statistics of targets and scales of losses on two processes: those of all samples, and one training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, StackDataset

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.training.checks import FSDP2_ON_CPU
from lightning_mtl.weighting import MGDA
from tests.distributed.pairs import Pair
from tests.distributed.table import DDP
from tests.small import heads, trunk
from tests.training import loader, quiet_trainer

KINDS: dict[str, dict[str, Any]] = {
    "measured": {"standardize": True},
    "given": {"standardize": (300.0, 35.0)},
    "running": {"standardize": "running"},
    "scaled": {"loss_scale": "initial"},
    "running scale": {"loss_scale": "running"},
}


def rows_of(inputs: Any, labels: Any) -> Any:
    return StackDataset(inputs, StackDataset(a=inputs[:, :1], b=labels))


class Sharded(MultiTaskModule):
    """Shards trunk and heads, where the strategy asks for it."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.trunk, FSDPModule):
            for part in (*self.heads.values(), self.trunk):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train(
    kinds: Sequence[str], at: str = "trunk", sharded: bool = False, rank: int = 0, ranks: int = 1
) -> dict[str, list[Any]]:
    """For each kind the parameters, predictions in raw units, and the statistics that the fit ended with."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 3, generator=generator)
    y = 300 + 35 * torch.randn(24, 1, generator=generator)
    y[[1, 2, 7, 8, 9]] = torch.nan  # the ranks have other numbers of labels
    found = {}
    for name in kinds:
        torch.manual_seed(2)
        tasks = {"a": Task(mse_loss), "b": Task(mse_loss, missing=torch.nan, **KINDS[name])}
        module = Sharded(trunk(), heads(), tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
        module = module.double()
        inputs, labels = x[rank::ranks].double(), y[rank::ranks].double()
        data = DataLoader(rows_of(inputs, labels), batch_size=8 // ranks)
        strategy: Any = "auto" if ranks == 1 else DDP()
        if sharded and ranks > 1:
            strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
        trainer = quiet_trainer(
            devices=ranks, strategy=strategy, use_distributed_sampler=False, max_epochs=2, callbacks=[MGDA(at=at)]
        )
        trainer.fit(module, data)
        units = module.target_units.of("b")
        scales = module.recorder.scales
        state = [] if units is None else [float(units.mean), float(units.std)]
        state += [] if scales is None else scales.values.tolist()
        state += trainer.predict(module, loader(x.double()))[0]["b"].flatten().tolist()  # type: ignore[index, call-overload]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
        found[name] = [parameters_to_vector(whole).detach(), state]
    return found


def assert_same(alone: dict[str, list[Any]], first: dict[str, list[Any]], second: dict[str, list[Any]]) -> None:
    for name, (parameters, state) in alone.items():
        assert first[name][1] == second[name][1] == pytest.approx(state, rel=1e-6)
        assert torch.equal(first[name][0], second[name][0]), name
        torch.testing.assert_close(first[name][0], parameters, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:In the first step the loss of task")
def test_two_processes_follow_one(pair: Pair) -> None:
    assert_same(train(list(KINDS)), *pair.run(train, list(KINDS), "trunk", False))


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on the CPU, which setup refuses")
@pytest.mark.filterwarnings("ignore:In the first step the loss of task")
@pytest.mark.parametrize("at", ["trunk", pytest.param("features", marks=pytest.mark.slow)])
def test_two_processes_that_hold_a_shard_of_each_parameter_follow_one(at: str, pair: Pair) -> None:
    kinds = [name for name in KINDS if name != "running"]
    assert_same(train(kinds, at), *pair.run(train, kinds, at, True))


@pytest.mark.slow
@pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on the CPU, which setup refuses")
def test_running_statistics_of_a_sharded_head_are_refused(pair: Pair) -> None:
    with pytest.raises(
        AssertionError, match=r"Task\(standardize='running'\) of task 'b' .* give standardize=\(mean, std\)"
    ):
        pair.run(train, ["running"], "trunk", True)
