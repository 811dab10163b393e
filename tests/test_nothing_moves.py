"""Steps that could move nothing: losses without a graph, a frozen model, an optimizer of other parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from tests.plain import momentum
from tests.small import TASKS, batches, small
from tests.test_users_bring import WAYS
from tests.training import fit, flat_parameters, loader


class Constant(MultiTaskModule):
    """The losses of some tasks are constants in every second batch; or the tasks are left out there."""

    constant: tuple[str, ...] = TASKS
    leaves_out = False
    batch = 0

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        self.batch += 1
        losses = {task: mse_loss(prediction, targets[task]) for task, prediction in self(inputs).items()}
        for task in self.constant if self.batch % 2 else ():
            if self.leaves_out:
                del losses[task]
            else:
                losses[task] = torch.tensor(0.5)
        return losses


def constant(*tasks: str, leaves_out: bool = False, accumulate: int = 1) -> Constant:
    module = small(cls=Constant, optimizer=momentum, accumulate_grad_batches=accumulate)
    assert isinstance(module, Constant)
    module.constant, module.leaves_out = tasks, leaves_out
    return module


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_without_any_graph_is_refused_by_name(way: str, *, automatic: bool) -> None:
    module = constant(*TASKS)
    module.automatic_optimization = automatic
    with pytest.raises(ValueError, match=r"No loss of the tasks \['a', 'b'\] depends on a parameter that trains"):
        fit(module, loader(*batches(4, 3)), callbacks=WAYS[way]())


@pytest.mark.parametrize("way", ["no weighting", "losses"])
def test_a_frozen_model_is_refused(way: str) -> None:
    module = small()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        fit(module, loader(*batches(4)), callbacks=WAYS[way]())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_constant_among_the_losses_moves_nothing(accumulate: int) -> None:
    """As if its task had been left out, for a sum of losses."""
    found, expected = constant("b", accumulate=accumulate), constant("b", leaves_out=True, accumulate=accumulate)
    for module in (found, expected):
        fit(module, loader(*batches(4, 3, 5, 4)))
    assert torch.equal(flat_parameters(found), flat_parameters(expected))


@pytest.mark.parametrize("automatic", [False, True])
def test_an_optimizer_of_another_model_is_told_of(*, automatic: bool) -> None:
    other = small()
    module = small(optimizer=lambda _: torch.optim.SGD(other.parameters(), lr=1.0))
    module.automatic_optimization = automatic
    with pytest.warns(UserWarning, match="no parameter of this MultiTaskModule.*build it from the parameters"):
        fit(module, loader(*batches(4)))
    assert torch.equal(flat_parameters(module), flat_parameters(small()))
