"""Optimizers that call their closure more than once a step: SAM, LBFGS, and an optimizer_step of one's own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Signals, Weighting
from lightning_mtl.weighting import MGDA, PCGrad, StaticWeights
from tests.small import batches, small
from tests.thinning import thinned
from tests.training import fit, flat_parameters, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 2.0, "b": 0.25}
WAYS: dict[str, Any] = {
    "losses": lambda: StaticWeights(WEIGHTS),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features"),
    "trunk": lambda: fixed(WEIGHTS, "gramian"),
    "heads alone": lambda: fixed(WEIGHTS, "gramian", weighs_heads=False),
    "features, heads alone": lambda: fixed(WEIGHTS, "gramian", at="features", weighs_heads=False),
}


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021): the gradient at the worst point nearby."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        loss: Tensor = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        old = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        closure()
        for p, before in zip(parameters, old, strict=True):
            p.copy_(before).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


OPTIMIZERS: dict[str, Any] = {"SAM": SAM, "LBFGS": lbfgs}


def plainly(make: Any, data: list[Any], size: int, *, heads_weighed: bool = True) -> Tensor:
    """What plain torch makes of the same weighted sum, in windows of ``size`` batches."""
    model = small()
    optimizer = make(model.parameters())

    def loss_of(batch: Any) -> Tensor:
        z = model.trunk(batch[0])
        total = torch.zeros(())
        for task, target in batch[1].items():
            weight = WEIGHTS[task]
            if not heads_weighed:
                scaled = z.detach() + weight * (z - z.detach())
                total = total + mse_loss(model.heads[task](scaled), target)
            else:
                total = total + weight * mse_loss(model.heads[task](z), target)
        return total

    for start in range(0, len(data), size):

        def closure(window: Any = data[start : start + size]) -> Tensor:
            with torch.enable_grad():
                optimizer.zero_grad()
                loss = torch.stack([loss_of(batch) for batch in window]).sum() / size
                loss.backward()
            return loss

        optimizer.step(closure)
    return flat_parameters(model)


def trained(make: Any, data: list[Any], size: int, weighting: Weighting, *, automatic: bool) -> Tensor:
    module = small(optimizer=make, accumulate_grad_batches=1 if automatic else size)
    module.automatic_optimization = automatic
    fit(module, loader(*data), callbacks=[weighting], accumulate_grad_batches=size if automatic else 1)
    return flat_parameters(module)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("size", thinned([2, 1]))
# No loss has the gradient of heads with weights of their own, and a line search needs one.
@pytest.mark.parametrize(
    ("name", "way"), [*(("SAM", way) for way in WAYS), *(("LBFGS", way) for way in WAYS if "alone" not in way)]
)
def test_as_plain_torch(name: str, way: str, size: int, automatic: bool) -> None:
    heads_weighed = "alone" not in way
    data, make = batches(4, 4, 4, 4), OPTIMIZERS[name]
    expected = plainly(make, data, size, heads_weighed=heads_weighed)
    found = trained(make, data, size, WAYS[way](), automatic=automatic)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("method", [MGDA, PCGrad])
def test_a_method_is_asked_and_updated_once_a_step(method: type[Weighting], automatic: bool) -> None:
    class Counting(method):  # type: ignore[valid-type, misc]
        asked = updates = 0

        def weigh(self, signals: Signals) -> Tensor:
            self.asked += 1
            return super().weigh(signals)  # type: ignore[no-any-return]

        def update(self, signals: Signals) -> None:
            self.updates += 1

    weighting = Counting()
    module = small(optimizer=lbfgs)
    module.automatic_optimization = automatic
    trainer = fit(module, loader(*batches(4, 4, 4)), callbacks=[weighting])
    assert (weighting.asked, weighting.updates, trainer.global_step) == (3, 3, 3)


def test_metrics_and_losses_of_an_epoch_count_a_batch_once() -> None:
    logged = []
    for make in (SAM, lambda parameters: torch.optim.SGD(parameters, lr=0.0)):
        kwargs = {"lr": 0.0} if make is SAM else {}
        trainer = fit(small(optimizer=lambda p, m=make, k=kwargs: m(p, **k)), loader(*batches(4, 2)))
        logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


@pytest.mark.parametrize("automatic", [False, True])
def test_a_second_pass_in_the_module_s_own_hook(automatic: bool) -> None:
    class Twice(MultiTaskModule):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            losses[:] = [float(optimizer_closure()) for _ in range(3)]
            optimizer.step(closure=optimizer_closure)

    losses: list[float] = []
    module = small(cls=Twice, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.automatic_optimization = automatic
    fit(module, loader(*batches(4)), callbacks=[MGDA()])
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("automatic", [False, True])
def test_without_weights_there_is_no_second_pass(automatic: bool) -> None:
    module = small(optimizer=SAM)
    module.automatic_optimization = automatic
    with pytest.raises(ValueError, match="WeightedSum combines gradients into a direction that no weights describe"):
        fit(module, loader(*batches(4)), callbacks=[WeightedSum(WEIGHTS)])


def test_gradients_are_clipped_and_hooks_called_for_each_pass() -> None:
    class Seen(pl.Callback):
        steps = zeros = 0

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.steps += 1

        def on_before_zero_grad(self, *_: Any) -> None:
            self.zeros += 1

    counts = []
    for automatic in (False, True):
        seen, module = Seen(), small(optimizer=SAM)
        module.automatic_optimization = automatic
        fit(module, loader(*batches(4, 4)), callbacks=[seen])
        counts.append((seen.steps, seen.zeros))
    assert counts == [(4, 4), (4, 4)]
