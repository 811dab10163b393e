"""Predictions and targets whose shapes an elementwise loss would broadcast."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtl import MaskedTarget, MultiTaskModule, Task
from tests.small import batch, heads, trunk
from tests.training import fit, loader, quiet_trainer

ELEMENTWISE: list[Any] = [
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    functools.partial(functools.partial(F.huber_loss, delta=2.0), reduction="mean"),
    nn.MSELoss(),
    nn.L1Loss(),
    nn.SmoothL1Loss(),
    nn.HuberLoss(),
    nn.BCELoss(),
    nn.BCEWithLogitsLoss(),
]


def module_of(loss: Any, **arguments: Any) -> MultiTaskModule:
    return MultiTaskModule(trunk(), heads(), {"a": Task(F.mse_loss), "b": Task(loss, **arguments)})


def flat_b(number: int = 4) -> tuple[Tensor, dict[str, Any]]:
    inputs, targets = batch(number)
    return inputs, targets | {"b": targets["b"].flatten()}


@pytest.mark.parametrize("loss", ELEMENTWISE)
def test_all_pairs_of_samples_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"Task 'b' has predictions of shape \[4, 1\] and targets of shape \[4\]"):
        module_of(loss).present_outputs(flat_b())


@pytest.mark.parametrize("fit_first", [True, False])
def test_every_stage_looks(fit_first: bool) -> None:
    module, trainer = module_of(F.mse_loss), quiet_trainer()
    if fit_first:
        trainer.fit(module, loader(batch()), loader(batch()))
    with pytest.raises(ValueError, match="every prediction with every target"):
        trainer.test(module, loader(flat_b()), verbose=False)


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's own
def test_a_batch_of_one_sample_does_not_hide_the_next() -> None:
    with pytest.raises(ValueError, match="every prediction"):
        fit(module_of(F.mse_loss), loader(flat_b(1), flat_b(4)))


def test_partial_labels_are_looked_at_as_the_loss_gets_them() -> None:
    inputs, targets = flat_b()
    masked = MaskedTarget(targets["b"], torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=r"\[3, 1\] and targets of shape \[3\]"):
        module_of(F.mse_loss).present_outputs((inputs, targets | {"b": masked}))


def test_what_repeats_one_of_the_two_warns_once() -> None:
    class Wide(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features[:, :2]

    module = module_of(F.huber_loss)
    module.heads["b"] = Wide()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, loader(*[batch()] * 3))
    own = [str(warning.message) for warning in said if "Task 'b' has predictions of shape" in str(warning.message)]
    assert len(own) == 1
    assert "repeats the smaller one" in own[0]


class Pairwise(nn.MSELoss):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()


@pytest.mark.parametrize(
    "loss",
    [lambda p, t: (p - t).square().mean(), Pairwise(), functools.partial(lambda p, t, k: (p - t).mean() * k, k=1)],
)
def test_losses_of_ones_own_may_broadcast(loss: Any) -> None:
    module_of(loss).present_outputs(flat_b())


def test_classes_are_no_elements() -> None:
    inputs, targets = batch()
    module = MultiTaskModule(trunk(), {"a": nn.Linear(4, 3)}, {"a": Task(F.cross_entropy)})
    module.present_outputs((inputs, {"a": targets["a"].flatten().long()}))
