"""The schemes of physics-informed networks in fits, beside plain loops, and what they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import BalancedModule, Task, TaskOutput, Weighting
from lightning_mtl.gradients.beside import kernel_trace
from lightning_mtl.weighting import (
    CRMOGM,
    MGDA,
    ConFIG,
    GradNorm,
    LRAnnealing,
    NTKWeighting,
    ReLoBRaLo,
    Rotating,
    SoftAdapt,
)
from lightning_mtl.weighting.config import config_weights
from tests.balanced.models import Physics, mlp, points
from tests.contract import ask, course, names
from tests.distributed.pairs import Pair
from tests.small import TASKS, batches, small
from tests.training import Steps, fit, flat_parameters, loader
from tests.weighting import physics_worker


class Slow(Physics):
    """Small steps, and residuals whose mean squares the losses are."""

    def __init__(self, scales: Mapping[str, float] | None = None) -> None:
        names = ("residual", "boundary", "initial")
        tasks = {task: Task(mse_loss, loss_scale=(scales or {}).get(task)) for task in names}
        BalancedModule.__init__(self, tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
        self.net = mlp(2, 6, 6, 1)

    def task_losses(self, batch: Any) -> Mapping[str, Any]:
        x = batch.clone().requires_grad_()
        u = self(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        residuals = {"residual": du[:, 1] - u[:, 0], "boundary": 3 * self(batch.round()), "initial": self(batch) - 1}
        return {task: TaskOutput(r.square().mean(), residuals=r) for task, r in residuals.items()}


def physics(cls: Callable[..., Physics] = Slow, **arguments: Any) -> Physics:
    torch.manual_seed(1)
    return cls(**arguments).double()


def data(number: int = 6) -> list[Tensor]:
    return [points("Physics", 5, seed) for seed in range(number)]


def rows(module: Physics, batch: Tensor) -> Tensor:
    found = []
    for value in module.task_losses(batch).values():
        loss = value.loss if isinstance(value, TaskOutput) else value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(found)


def descend(module: Physics, direction: Tensor) -> None:
    begin = 0
    for parameter in module.parameters():
        parameter.data -= 0.01 * direction[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()


def weights_of(steps: Steps) -> Tensor:
    return torch.stack([weights for weights in steps.weights if weights is not None]).double()


def test_rotating_renews_one_gradient_a_step_and_applies_the_present_ones() -> None:
    module, steps = physics(), Steps()
    fit(module, loader(*data()), callbacks=[Rotating(ConFIG()), steps], max_epochs=1)
    plain, kept, expected = physics(), torch.zeros(0), []
    for step, batch in enumerate(data()):
        present = rows(plain, batch)
        if step == 0:
            kept = present.clone()
        else:
            kept[(step - 1) % 3] = present[(step - 1) % 3]
        expected.append(config_weights(kept @ kept.T))
        descend(plain, expected[-1] @ present)
    torch.testing.assert_close(weights_of(steps), torch.stack(expected), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(flat_parameters(module), flat_parameters(plain))
    assert all(one.norms is None for one in steps.signals)  # those kept are no norms of this step


def test_rotating_takes_one_gradient_and_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = torch.autograd.grad, list[int]()

    def counting(outputs: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        if not named.get("create_graph"):
            calls.append(len(inputs))
        return plain(outputs, inputs, *arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    # A head for each task: GradNorm weighs them as the trunk, so that the weighted losses' own pass is enough.
    fit(small(), loader(*batches(4, 4, 4)), callbacks=[Rotating(GradNorm(at="trunk"))])
    assert calls == [4, 4, 4, 4]  # the first step measures both tasks


@pytest.mark.parametrize(
    "make", [lambda: Rotating(MGDA()), lambda: LRAnnealing(0.5), lambda: Rotating(GradNorm(at="trunk"))]
)
def test_accumulation_is_the_whole_batch(make: Callable[[], Weighting]) -> None:
    whole, halves = small(), small(accumulate_grad_batches=2)
    parts = batches(4, 4, 4, 4, 4, 4)
    joined = [
        (torch.cat([a[0], b[0]]), {task: torch.cat([a[1][task], b[1][task]]) for task in TASKS})
        for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    fit(whole, loader(*joined), callbacks=[make()])
    fit(halves, loader(*parts), callbacks=[make()])
    torch.testing.assert_close(flat_parameters(halves), flat_parameters(whole), rtol=1e-4, atol=1e-5)


def test_rotating_measures_a_new_task_at_once_and_the_oldest_next() -> None:
    weighting = Rotating(MGDA())
    weighting.reset(names(3))
    measured = []
    for step, present in enumerate(([0, 2], [0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2])):
        given = replace(course(3, steps=6)[step].cut(present), norms=None)
        chosen = weighting.to_renew(given.tasks, 7)
        measured.append([given.tasks[position] for position in chosen])
        new = torch.randn(len(chosen), 7, generator=torch.Generator().manual_seed(step))
        weighting.decide(given, present, measured=True, rows=[new[:, :3], new[:, 3:]])
        if step != 3:  # which was skipped
            weighting.observe(given, present)
    assert measured == [["a", "c"], ["a"], ["b"], ["c"], ["c"], ["b"]]
    # Other parameters than before have other gradients, all of which are new.
    assert weighting.to_renew(("a", "b", "c"), 8) == [0, 1, 2]
    torch.testing.assert_close(weighting.products, (weighting.memory.double() @ weighting.memory.double().T))


@pytest.mark.parametrize("main", [None, "boundary"])
def test_lr_annealing(main: str | None) -> None:
    module, steps = physics(), Steps()
    weighting = LRAnnealing(0.3, main=main, every_n_steps=2, importance={"initial": 2.0})
    fit(module, loader(*data()), callbacks=[weighting, steps], max_epochs=1)
    plain, lambdas, own = physics(), torch.ones(3, dtype=torch.float64), 0 if main is None else 1
    for step, batch in enumerate(data()):
        present = rows(plain, batch)
        if step % 2 == 0:
            ratios = present[own].abs().max() / present.abs().mean(1)
            ratios[own] = 1.0
            lambdas = 0.7 * lambdas + 0.3 * ratios
        applied = lambdas * torch.tensor([1.0, 1.0, 2.0])
        torch.testing.assert_close(weights_of(steps)[step], applied, rtol=1e-5, atol=0.0)
        descend(plain, applied @ present)
    torch.testing.assert_close(flat_parameters(module), flat_parameters(plain), rtol=1e-5, atol=1e-7)


def test_lr_annealing_keeps_what_a_step_does_not_show() -> None:
    weighting = LRAnnealing(1.0)
    weighting.reset(names(3))
    given = course(3)[0]
    some = torch.tensor([[4.0, -2.0], [0.0, 0.0], [1.0, 0.0]])
    assert weighting.decide(given, range(3), measured=True, rows=[some]).weights.tolist() == [1.0, 1.0, 8.0]
    weighting.observe(given, range(3))
    # Without the main task, and where its gradient is zero, all stay.
    assert weighting.decide(given.cut([1, 2]), [1, 2], measured=True, rows=[some[1:]]).weights.tolist() == [1.0, 8.0]
    gone = some * torch.tensor([[0.0], [1.0], [1.0]])
    assert weighting.decide(given, range(3), measured=True, rows=[gone]).weights.tolist() == [1.0, 1.0, 8.0]


def test_kernel_traces_by_probes() -> None:
    module = physics()
    outputs: dict[str, Any] = dict(module.task_losses(data()[0]))
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(0)
    for output in outputs.values():
        exact: Any = torch.zeros(())
        for r in output.residuals.flatten():
            exact = exact + sum(g.square().sum() for g in torch.autograd.grad(r, parameters, retain_graph=True))
        exact = exact / output.residuals.numel()
        found = kernel_trace(output.residuals, parameters, 500, generator)
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.0)
        scaled = kernel_trace(output.residuals, parameters, 5, torch.Generator(), torch.tensor(1024.0))
        torch.testing.assert_close(scaled, kernel_trace(output.residuals, parameters, 5, torch.Generator()))
    # One residual has nothing to cancel.
    one = module(points("Physics", 1))
    exact = sum(g.square().sum() for g in torch.autograd.grad(one, parameters, retain_graph=True))
    torch.testing.assert_close(kernel_trace(one, parameters, 1, generator), exact)
    assert float(kernel_trace(one.detach(), parameters, 1, generator)) == 0.0


def test_ntk_weights_in_a_fit() -> None:
    module, steps = physics(), Steps()
    weighting = NTKWeighting(0.5, probes=2, seed=3, every_n_steps=2)
    fit(module, loader(*data()), callbacks=[weighting, steps], max_epochs=1)
    plain, draws = physics(), NTKWeighting(seed=3)
    means, weights = torch.zeros(3), torch.ones(3, dtype=torch.float64)
    for step, batch in enumerate(data()):
        if step % 2 == 0:
            parameters, signs = list(plain.parameters()), draws.probes(torch.device("cpu"))
            outputs: Any = plain.task_losses(batch).values()
            traces = torch.stack([kernel_trace(output.residuals, parameters, 2, signs) for output in outputs])
            means = traces if step == 0 else 0.5 * means + 0.5 * traces
            weights = means.sum() / means
        torch.testing.assert_close(weights_of(steps)[step], weights, rtol=1e-5, atol=0.0)
        draws.advance("random")
        descend(plain, weights @ rows(plain, batch))
    torch.testing.assert_close(flat_parameters(module), flat_parameters(plain), rtol=1e-5, atol=1e-7)
    assert steps.signals[0].traces is not None
    assert steps.signals[1].traces is None


def test_ntk_weights_follow_the_scale_of_a_loss() -> None:
    def weights(scales: Mapping[str, float]) -> Tensor:
        module, steps = physics(scales=scales), Steps()
        fit(module, loader(data()[0]), callbacks=[NTKWeighting(), steps])
        return weights_of(steps)[0]

    plain, scaled = weights({}), weights({"boundary": 100.0})
    traces = plain.sum() / plain  # proportional to the traces
    traces[1] /= 100
    expected = traces.sum() / traces  # as the method has them, before the scales
    torch.testing.assert_close(scaled / scaled[0], expected / expected[0], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftAdapt(normalized=True),
        lambda: ReLoBRaLo(0.9, rho=0.5),
        lambda: LRAnnealing(every_n_steps=2),
        lambda: NTKWeighting(every_n_steps=2),
        lambda: CRMOGM(NTKWeighting()),
        lambda: Rotating(ConFIG()),
    ],
)
def test_resuming_to_the_bit(make: Callable[[], Weighting], tmp_path: Path) -> None:
    whole, first, second = physics(), physics(), physics()
    fit(whole, loader(*data(3)), callbacks=[make()], max_epochs=2)
    fit(first, loader(*data(3)), callbacks=[make()], max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, loader(*data(3)), callbacks=[make()], max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert not torch.equal(flat_parameters(first), flat_parameters(second))
    assert torch.equal(flat_parameters(whole), flat_parameters(second))


@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", physics_worker.MAKES)
def test_two_ranks(name: str, accumulate: int, pair: Pair) -> None:
    first, second = pair.run(physics_worker.train, name, accumulate)
    assert torch.equal(first, second)
    if name != "NTKWeighting":  # whose ranks draw signs of their own
        torch.testing.assert_close(first, physics_worker.train(name, accumulate), rtol=1e-9, atol=1e-9)


def test_a_wrapped_method_sees_its_traces() -> None:
    weighting = CRMOGM(NTKWeighting(0.0), alpha=0.5)
    weighting.reset(names(2))
    first, second = course(2, steps=2)
    one, two = (given.traces.sum() / given.traces for given in (first, second) if given.traces is not None)
    torch.testing.assert_close(ask(weighting, first).double(), one, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ask(weighting, second).double(), (one + two) / 2, rtol=1e-5, atol=0.0)
