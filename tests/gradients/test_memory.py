"""How many numbers the exact way holds beyond plain training."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mtl import Aggregator, MultiTaskModule, Signals, Task
from tests.training import fit, loader
from tests.weightings import fixed

WIDTH = 300
BATCHES = 3


class PlainSum(pl.LightningModule):
    """The same trunk and heads, trained on the sum of the losses by automatic optimization."""

    def __init__(self, trunk: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        z = self.trunk(inputs)
        return torch.stack([mse_loss(self.heads[task](z), y) for task, y in targets.items()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def parts(num_tasks: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return trunk, {f"task{k}": nn.Linear(WIDTH, 1) for k in range(num_tasks)}


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made by any operation, forward or backward, while something holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.made = {key: found for key, found in self.made.items() if not found[0].expired()}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:  # neither a view nor changed in place
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.highest = max(self.highest, sum(size for _, size in self.made.values()))
        return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak(module: pl.LightningModule, batch: Any, callbacks: list[Any]) -> int:
    """The most bytes alive at once during a fit, beyond those before."""
    with Alive() as alive:
        fit(module, loader(*[batch] * BATCHES), callbacks=callbacks)
    return int(alive.highest)


class Halves(Aggregator):
    """Half of the sum, keeping nothing."""

    def combine(self, signals: Signals, rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(0).mul_(0.5)


@pytest.mark.parametrize("num_tasks", [2, 6])
@pytest.mark.parametrize("method", ["weights", "aggregator"])
def test_the_trunks_rows_take_k_plus_two_times_its_parameters(num_tasks: int, method: str) -> None:
    trunk, heads = parts(num_tasks)
    weights = dict.fromkeys(heads, 0.5)
    batch = (torch.randn(1, WIDTH), {task: torch.randn(1, 1) for task in heads})
    tasks = {task: Task(mse_loss) for task in heads}
    module = MultiTaskModule(trunk, heads, tasks, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    plain = peak(PlainSum(*parts(num_tasks)), batch, [])
    weighting = fixed(weights, "gramian", gradients="rows") if method == "weights" else Halves()
    rows = peak(module, batch, [weighting])
    row_bytes = 4 * sum(p.numel() for p in trunk.parameters())
    assert plain >= row_bytes  # the gradients of plain training have been counted
    assert rows - plain >= num_tasks * row_bytes  # and so have the rows
    # Activations, losses and the Gramian are small beside one row here.
    assert rows - plain <= (num_tasks + 2) * row_bytes + 0.2 * row_bytes


@pytest.mark.parametrize("num_tasks", [2, 6])
def test_a_gramian_takes_no_rows_of_layers_with_more_inputs_than_samples(num_tasks: int) -> None:
    trunk, heads = parts(num_tasks)
    batch = (torch.randn(1, WIDTH), {task: torch.randn(1, 1) for task in heads})
    tasks = {task: Task(mse_loss) for task in heads}
    module = MultiTaskModule(trunk, heads, tasks, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    plain = peak(PlainSum(*parts(num_tasks)), batch, [])
    found = peak(module, batch, [fixed(dict.fromkeys(heads, 0.5), "gramian")])
    assert found - plain <= 0.1 * 4 * sum(p.numel() for p in trunk.parameters())
