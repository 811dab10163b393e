"""Models and trainings found by attack: exact, or refused with the reason."""

from __future__ import annotations

import functools
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mtl import Monitor, Signals
from tests.gradients.checks import HARMLESS, Close, Watch, check_gradients, train
from tests.gradients.methods import FromGramian, FromLosses, Method
from tests.gradients.per_task import gradients_of
from tests.gradients.situations import BY_NAME
from tests.gradients.situations.base import WIDTH, Loss, Net, classification, random_inputs, regression, seed_everything
from tests.training import fit, loader

pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in (*HARMLESS, "ignore:You.re resuming")]

PLACES = ("trunk", "features", "last_layer")


def build(make: Any, **arguments: Any) -> Any:
    seed_everything(3)
    return make(**arguments)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Reentrant(Body):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=True)


class PassesBackwardItself(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Any:
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.module(x), gradients)
        return x.grad, None


class Reversible(Body):
    """As reversible layers do, its backward pass adds to the parameters' gradients past autograd."""

    def forward(self, x: Tensor) -> Any:
        return PassesBackwardItself.apply(x.clone().requires_grad_(), self.body)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("trunk", [Reentrant, Reversible])
def test_parameters_that_autograd_does_not_show_are_trained_or_refused(trunk: Any, place: str) -> None:
    weighting = FromGramian(at=place)
    try:
        watch = train(build(functools.partial(Net, trunk=trunk)), [random_inputs(0)], weighting)
    except (ValueError, RuntimeError) as error:
        assert "reentrant" in str(error) or "backward" in str(error) or "last_layer" in str(error)  # noqa: PT017
        return
    expected = gradients_of(functools.partial(build, functools.partial(Net, trunk=Body)), random_inputs(0), "trunk")
    weights = watch.weights_of(0)
    check_gradients(
        watch.gradients[0], expected.weighted(weights, Method(FromGramian).heads(weighting, weights)), 1e-12
    )


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prompt = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.layer(x)), self.prompt


class WithTeacher(Net):
    def losses(self, x: Tensor) -> Loss:
        with torch.no_grad():
            target, _ = self.trunk(x + 0.1)
        z, prompt = self.trunk(x)
        z = z * prompt
        consistency = (z - target).square().mean()
        return {"a": regression(self.heads["a"](z), x) + consistency, "b": classification(self.heads["b"](z), x)}


class Pyramid(tuple[Tensor, ...]):
    def __new__(cls, low: Tensor, high: Tensor) -> Pyramid:
        return super().__new__(cls, (low, high))


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Pyramid:
        low = torch.tanh(self.low(x))
        return Pyramid(low, torch.tanh(self.high(low)))


class ByLevels(Net):
    def losses(self, x: Tensor) -> Loss:
        low, high = self.trunk(x)
        return {"a": regression(self.heads["a"](low + high), x), "b": classification(self.heads["b"](high), x)}


@pytest.mark.parametrize("place", ["features", "last_layer"])
@pytest.mark.parametrize(
    "make", [functools.partial(WithTeacher, trunk=Prompted), functools.partial(ByLevels, trunk=Levels)]
)
def test_what_plain_training_takes_is_taken(make: Any, place: str) -> None:
    weighting = FromGramian(at=place)
    try:
        watch = train(build(make), [random_inputs(0)], weighting)
    except ValueError:
        return
    weights = watch.weights_of(0)
    expected = gradients_of(functools.partial(build, make), random_inputs(0), "trunk").weighted(weights, weights)
    check_gradients(watch.gradients[0], expected, 1e-12)


@pytest.mark.parametrize("name", ["complex features", "complex layer and features"])
def test_complex_features_of_two_micro_batches(name: str) -> None:
    situation = BY_NAME[name]
    one = train(situation.build(), [situation.inputs(0)], FromGramian(at="features")).signals[0].gramian
    batches = [situation.inputs(0)] * 2
    two = train(situation.build(accumulate_grad_batches=2), batches, FromGramian(at="features")).signals[0].gramian
    assert one is not None
    assert two is not None
    Close(1e-5).check(two, one / 2, "gramian")  # the features of two micro-batches are orthogonal


class Sees(Monitor):
    measures = "gramian"
    at = "features"

    def observe(self, trainer: Any, pl_module: Any, signals: Signals, weights: Tensor | None) -> None:
        self.seen = signals.gramian


@pytest.mark.parametrize("who", ["accumulation", "monitor"])
def test_features_of_nested_calls_are_the_same_for_all_who_ask(who: str) -> None:
    situation, sees = BY_NAME["trunk applied twice"], Sees()
    expected = train(situation.build(), [situation.inputs(0)], FromGramian(at="features")).signals[0].gramian
    assert expected is not None
    if who == "monitor":
        train(situation.build(), [situation.inputs(0)], FromLosses(), sees)
        found = sees.seen
    else:
        batches = [situation.inputs(0)] * 2
        watch = train(situation.build(accumulate_grad_batches=2), batches, FromGramian(at="features"))
        found, expected = watch.signals[0].gramian, expected / 2
    assert found is not None
    Close(1e-12).check(found, expected, "gramian")


class Besides(Net):
    """Calls the trunk for nothing, and for the losses in a way that shows no output."""

    def losses(self, x: Tensor) -> Loss:
        self.trunk(x)
        z = self.trunk.forward(x)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


@pytest.mark.parametrize("size", [1, 2])
def test_losses_that_read_no_output_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at 'trunk'"):
        train(build(Besides, accumulate_grad_batches=size), [random_inputs(0)] * size, FromGramian(at="features"))


class Interrupted(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path, self.done = path, False

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if not self.done and rest[-1] == 2:
            trainer.save_checkpoint(self.path)
        if not self.done and rest[-1] == 4:
            self.done = True
            raise InterruptedError


@pytest.mark.filterwarnings("ignore:.*written inside.*optimizer step:UserWarning")
@pytest.mark.parametrize("place", ["trunk", "features"])
def test_a_fit_begins_without_what_an_interrupted_one_has_collected(place: str, tmp_path: Path) -> None:
    batches, path = [random_inputs(i) for i in range(8)], tmp_path / "last.ckpt"
    make, found, expected = functools.partial(build, Net, lr=0.1, accumulate_grad_batches=2), Watch(), Watch()
    module, weighting = make(), FromGramian(at=place)
    with pytest.raises(InterruptedError):
        fit(module, loader(*batches), callbacks=[Interrupted(path), weighting])
    fit(module, loader(*batches), callbacks=[weighting, found], ckpt_path=path)
    fit(make(), loader(*batches), callbacks=[FromGramian(at=place), expected], ckpt_path=path)
    check_gradients(found.gradients[0], expected.gradients[0], 1e-12)


class Activation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x) * 1.5
        self.seen = weakref.ref(hidden)
        output: Tensor = hidden.sin().cos()
        return output


class Decayed(Net):
    def penalties(self) -> dict[str, Tensor]:
        return {"decay": torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum()}


class Alive(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        gc.collect()
        self.alive = pl_module.trunk.seen() is not None


@pytest.mark.parametrize("make", [Net, Decayed])
def test_activations_are_gone_when_the_optimizer_steps(make: Any) -> None:
    alive = Alive()
    train(build(functools.partial(make, trunk=Activation)), [random_inputs(0)], FromGramian(), alive)
    assert not alive.alive


def test_a_trained_module_can_be_pickled() -> None:
    module = build(Net, accumulate_grad_batches=2)
    train(module, [random_inputs(0)] * 2, FromGramian(at="features"))
    assert pickle.loads(pickle.dumps(module)).tasks.keys() == {"a", "b"}
