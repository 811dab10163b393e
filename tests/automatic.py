"""Lightning's automatic optimization of the same weighted sum: what manual optimization must reproduce."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import StaticWeights
from tests.training import History, fit, loader
from tests.weightings import fixed

WEIGHTS = {"a": 2.0, "b": 0.25}
# The three ways in which the same weights reach the gradients.
WAYS = ("losses", "trunk", "features")

Configure = Callable[[Iterable[Any]], Any]


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Automatic(pl.LightningModule):
    """A plain LightningModule on the weighted sum, with a penalty, logging under the names of ours."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, configure: Configure) -> None:
        super().__init__()
        self.trunk, self.heads, self.configure = trunk, heads, configure

    def losses(self, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        z = self.trunk(inputs)
        return {task: mse_loss(self.heads[task](z), target) for task, target in targets.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        for task, loss in losses.items():
            self.log(f"loss/{task}", loss, on_step=True)
            self.log(f"loss_epoch/{task}", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        penalty = 0.01 * torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum()
        return torch.stack([WEIGHTS[task] * loss for task, loss in losses.items()]).sum() + penalty

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for task, loss in self.losses(batch).items():
            self.log(f"val/loss/{task}", loss, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


class Manual(MultiTaskModule):
    """Ours, on the same."""

    configure: Configure = staticmethod(sgd)

    def penalties(self) -> dict[str, Tensor]:
        return {"l2": 0.01 * torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum()}

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


@dataclass
class Run:
    """What a comparison needs: data, and what the Trainer does in automatic and the module in manual optimization."""

    configure: Configure = sgd
    batches: int = 5
    epochs: int = 2
    way: str = "losses"
    accumulate: int = 1
    clip: float | None = None
    algorithm: str = "norm"
    val: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


def batches(number: int, seed: int = 3) -> list[Any]:
    """Random batches; the last one is smaller."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [4] * (number - 1) + [2]
    return [
        (
            torch.randn(n, 3, generator=generator, dtype=torch.float64),
            {task: torch.randn(n, 1, generator=generator, dtype=torch.float64) for task in WEIGHTS},
        )
        for n in sizes
    ]


def weighting_of(way: str) -> Weighting:
    return StaticWeights(WEIGHTS) if way == "losses" else fixed(WEIGHTS, "gramian", at=way)


def automatic_and_manual(run: Run) -> tuple[History, History]:
    """The histories of both."""
    torch.manual_seed(1)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in WEIGHTS}).double()
    own_trunk, own_heads = copy.deepcopy(trunk), copy.deepcopy(heads)
    automatic, manual = History(), History()
    train, val = loader(*batches(run.batches)), loader(*batches(2, seed=8)) if run.val else None
    arguments: dict[str, Any] = {"max_epochs": run.epochs, "log_every_n_steps": 1, **run.trainer}
    fit(
        Automatic(trunk, heads, run.configure),
        train,
        val,
        callbacks=[automatic],
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        gradient_clip_algorithm=run.algorithm,
        **arguments,
    )
    module = Manual(
        own_trunk,
        own_heads,  # type: ignore[arg-type]  # a mapping in all but name
        {task: Task(mse_loss) for task in WEIGHTS},
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        gradient_clip_algorithm=run.algorithm,  # type: ignore[arg-type]
    )
    module.configure = run.configure
    fit(module, train, val, callbacks=[manual, weighting_of(run.way)], **arguments)
    return automatic, manual


def assert_same_history(run: Run) -> tuple[History, History]:
    """Parameters and learning rates agree after every batch; return the histories."""
    automatic, manual = automatic_and_manual(run)
    assert len(automatic.parameters) == len(manual.parameters)
    torch.testing.assert_close(torch.stack(manual.parameters), torch.stack(automatic.parameters), rtol=0, atol=1e-9)
    torch.testing.assert_close(manual.rates, automatic.rates, rtol=0, atol=1e-9)
    return automatic, manual
