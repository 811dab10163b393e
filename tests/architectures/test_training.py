"""Every trunk under the gradient engine, compiled, with a loader a task, and resumed."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from lightning_mtl import MultiTaskModule
from lightning_mtl.architectures import LTB, Branching, SoftSharing
from lightning_mtl.weighting import MGDA, PCGrad
from tests.architectures.trunks import TASKS, TRUNKS, build, close, ltb, module_of, regression, soft_sharing
from tests.contract import one_of_each, reach
from tests.contract_rows import METHODS
from tests.small import TASKS as SMALL_TASKS
from tests.training import Steps, fit, flat_parameters, loader
from tests.weightings import fixed

WEIGHTS = {"a": 0.3, "b": 1.7}
WAYS: dict[str, Any] = {
    "losses": lambda: fixed(WEIGHTS, "losses"),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features"),
    "trunk": lambda: fixed(WEIGHTS, "gramian", at="trunk"),
    "last layer": lambda: fixed(WEIGHTS, "norms", at="last_layer"),
}
each = pytest.mark.parametrize("name", TRUNKS)


def losses_of(module: MultiTaskModule, batch: Any) -> dict[str, Tensor]:
    return {task: output.loss for task, output in module.present_outputs(batch).items()}


@each
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_weighted_losses_and_penalties(name: str, way: str) -> None:
    module, batch, steps = build(name), regression(), Steps()
    losses = losses_of(module, batch)
    objective = sum(WEIGHTS[task] * loss for task, loss in losses.items()) + sum(module.penalties().values())
    expected = torch.autograd.grad(objective, list(module.parameters()), materialize_grads=True)  # type: ignore[arg-type]
    fit(module, loader(batch), callbacks=[WAYS[way](), steps])
    for (parameter, found), gradient in zip(steps.gradients[0].items(), expected, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(gradient) if found is None else found, gradient, rtol=1e-4, atol=1e-6, msg=parameter
        )


def test_soft_sharing_has_a_diagonal_gramian() -> None:
    module, weighting = build("soft sharing"), fixed(WEIGHTS, "gramian")
    fit(module, loader(regression()), callbacks=[weighting])
    gramian = weighting.asked[0].gramian
    assert gramian is not None
    assert not (gramian - gramian.diag().diag()).any()
    assert (gramian.diag() > 0).all()


# DTP wants a metric, and measures in no way of its own.
GENERAL = [make for name, make in METHODS.items() if name != "DTP"]


@pytest.mark.parametrize("make", one_of_each(GENERAL, reach))
@pytest.mark.parametrize("name", ["soft sharing", "cross-stitch", "learning to branch"])
def test_every_weighting_trains_it(name: str, make: Any) -> None:
    assert SMALL_TASKS == TASKS
    module = build(name)
    before = flat_parameters(module)
    fit(module, loader(regression(), regression(seed=6)), callbacks=[make()])
    after = flat_parameters(module)
    assert after.isfinite().all()
    assert (after != before).float().mean() > 0.5


@each
@pytest.mark.parametrize("way", ["trunk", pytest.param("losses", marks=pytest.mark.slow)])
def test_compiled(name: str, way: str) -> None:
    torch.compiler.reset()
    plain, module = build(name), build(name)
    with functorch.patch(donated_buffer=False):
        module.trunk = torch.compile(module.trunk, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        data = [regression(seed=seed) for seed in range(3)]
        fit(module, loader(*data), callbacks=[WAYS[way]()])
    fit(plain, loader(*data), callbacks=[WAYS[way]()])
    close(flat_parameters(module), flat_parameters(plain))
    assert module.penalties().keys() == plain.penalties().keys()


def test_a_task_with_a_loader_of_its_own_runs_its_backbone_alone() -> None:
    module, ran = build("soft sharing"), []
    assert isinstance(module.trunk, SoftSharing)
    for task, backbone in module.trunk.backbones.items():
        backbone.register_forward_hook(lambda *_, task=task: ran.append(task))
    inputs, targets = regression()
    fit(module, loader({task: (inputs, targets[task]) for task in TASKS}), callbacks=[MGDA()])
    assert ran == ["a", "b"]


def test_penalties_of_parts_of_the_trunk() -> None:
    nested = module_of(nn.Sequential(nn.Linear(3, 3), soft_sharing()))
    assert list(nested.penalties()) == ["soft_sharing"]
    twice = module_of(nn.Sequential(soft_sharing(), soft_sharing()))
    assert list(twice.penalties()) == ["0.soft_sharing", "1.soft_sharing"]
    twice.trunk = nn.Linear(3, 4)
    assert twice.penalties() == {}

    class Weighted(MultiTaskModule):
        def penalties(self) -> dict[str, Tensor]:
            return {**super().penalties(), "own": self.heads["a"].get_parameter("weight").square().sum()}

    own = Weighted(soft_sharing(), {task: nn.Linear(4, 1) for task in TASKS}, nested.tasks)
    assert list(own.penalties()) == ["soft_sharing", "own"]


def branches() -> MultiTaskModule:
    torch.manual_seed(0)
    return module_of(ltb(), optimizer=functools.partial(torch.optim.Adam, lr=0.05))


def schedule() -> list[Any]:
    return [Branching(warmup_epochs=1, harden_epoch=4, heatmaps=False), PCGrad(at="features")]


@pytest.mark.parametrize("epochs", [2, 5], ids=["before hardening", "after"])
def test_learning_to_branch_resumes_to_the_bit(epochs: int, tmp_path: Path) -> None:
    data = [regression(seed=seed) for seed in range(3)]
    whole = branches()
    fit(whole, loader(*data), max_epochs=6, callbacks=schedule())
    first, saved = branches(), tmp_path / "half.ckpt"
    fit(first, loader(*data), max_epochs=epochs, callbacks=schedule()).save_checkpoint(saved)
    assert isinstance(first.trunk, LTB)
    assert first.trunk.hardened is (epochs > 4)
    torch.load(saved, weights_only=True)  # tensors and plain numbers alone
    resumed = branches()
    fit(resumed, loader(*data), max_epochs=6, callbacks=schedule(), ckpt_path=saved)
    assert torch.equal(flat_parameters(resumed), flat_parameters(whole))
    assert isinstance(resumed.trunk, LTB)
    assert isinstance(whole.trunk, LTB)
    assert resumed.trunk.tree == whole.trunk.tree is not None


def test_one_noise_for_a_window_of_micro_batches() -> None:
    torch.manual_seed(0)
    whole, parts = (module_of(ltb(), accumulate_grad_batches=size) for size in (1, 2))
    parts.load_state_dict(whole.state_dict())
    inputs, targets = regression(8)
    halves = [(inputs[cut], {k: y[cut] for k, y in targets.items()}) for cut in (slice(4), slice(4, 8))]
    fit(whole, loader(*[(inputs, targets)] * 3), callbacks=[Branching(heatmaps=False)])
    fit(parts, loader(*itertools.chain(*[halves] * 3)), callbacks=[Branching(heatmaps=False)])
    close(flat_parameters(parts), flat_parameters(whole))
