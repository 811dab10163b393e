"""What every method owes to a module without a trunk, in the settings in which a MultiTaskModule is tried."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mtl import Aggregator, BalancedModule, TaskOutput, Weighting
from lightning_mtl.weighting import DBMTL, FAMO
from tests.balanced.by_hand import LR, ByHand
from tests.balanced.models import mlp
from tests.balanced.worker import METHODS, train
from tests.contract import habits, memory, one_of_each
from tests.distributed.pairs import Pair
from tests.thinning import thinned
from tests.training import Steps, fit, flat_parameters, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning"),
    pytest.mark.filterwarnings("ignore:In the first step the loss of task:UserWarning"),
]

# What they move by no weights describe.
DIRECTIONS = (Aggregator, DBMTL)

# The module's arguments or, in automatic optimization, the Trainer's; and the tasks of each batch.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "abc abc abc abc"),
    "absent": ({}, "abc ab abc c bc abc"),
    "accumulated": ({"accumulate_grad_batches": 2}, "abc abc a bc abc c abc"),
    "clipped": ({"gradient_clip_val": 0.2}, "abc ab abc"),
}


class Decay(BalancedModule):
    """A derivative as the first loss; a layer that the second task alone reaches."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b", "c"], optimizer=functools.partial(torch.optim.SGD, lr=LR), **arguments)
        torch.manual_seed(3)
        self.net, self.own = mlp(2, 4, 4, 1), nn.Linear(2, 1)

    def task_losses(self, batch: Any) -> dict[str, TaskOutput]:
        x, tasks = batch[0].clone().requires_grad_(), batch[1]
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        wrong = {"a": slope.sum(1) + u[:, 0], "b": u + self.own(x) - 1, "c": (u - x[:, :1])[:3]}
        return {k: TaskOutput(r.square().mean(), residuals=r) for k, r in wrong.items() if k in tasks}


def batches(text: str) -> list[tuple[torch.Tensor, str]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(5, 2, generator=generator, dtype=torch.float64), tasks) for tasks in text.split()]


@pytest.mark.parametrize("automatic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", one_of_each(METHODS.values(), habits))
def test_each_step_is_what_differentiating_each_loss_says(
    make: Callable[[], Weighting], setting: str, automatic: bool
) -> None:
    arguments, tasks = SETTINGS[setting]
    module, weighting, steps = Decay(**({} if automatic else arguments)).double(), make(), Steps()
    module.automatic_optimization = automatic
    if automatic and isinstance(weighting, FAMO):  # which is not shown the end of such a step
        weighting = FAMO(losses_after="next_batch")
    size, clip = arguments.get("accumulate_grad_batches", 1), arguments.get("gradient_clip_val")
    by_hand = ByHand(weighting, steps, size, clip)
    given = batches(tasks)
    fit(
        module,
        loader(*given),
        callbacks=[weighting, steps, by_hand],
        max_epochs=2,
        precision=64,
        **(arguments if automatic else {}),
    )
    assert len(steps.weights) == 2 * -(-len(given) // size)
    assert by_hand.compared == (0 if isinstance(weighting, DIRECTIONS) else len(steps.weights))
    assert torch.isfinite(flat_parameters(module)).all()


@pytest.mark.parametrize("make", thinned(one_of_each(METHODS.values(), memory), 6))
def test_a_run_that_resumes_goes_on_to_the_bit(make: Callable[[], Weighting], tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> Any:
        module, weighting = Decay().double(), make()
        arguments: dict[str, Any] = {"callbacks": [weighting], "max_epochs": epochs, "ckpt_path": ckpt_path}
        trainer = fit(module, loader(*batches("abc ab c")), precision=64, **arguments)
        return trainer, flat_parameters(module), weighting.state_dict()["state"]

    _, whole, states = run(3)
    run(2)[0].save_checkpoint(tmp_path / "stop.ckpt")
    _, resumed, again = run(3, tmp_path / "stop.ckpt")
    assert torch.equal(whole, resumed)
    assert states.keys() == again.keys()
    for name, state in states.items():
        assert torch.equal(state.nan_to_num(7.0), again[name].nan_to_num(7.0)), name


# One process would draw other probes, and other numbers where chance decides.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "NTKWeighting"])
def test_two_ranks_follow_one_process(name: str, pair: Pair) -> None:
    (first, known), (second, other) = pair.run(train, name, 1)
    expected, alone = train(name, 1)
    assert torch.equal(first, second)
    assert known == other == alone
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-7)
