"""Lightning's hooks are called in manual optimization as often, and with the same arguments, as in automatic."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_mtl import MultiTaskModule
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import MGDA, StaticWeights
from tests.small import batches, small
from tests.training import fit, flat_parameters, loader

# What Lightning calls on a module beside its hooks by name.
STEPS = (
    *("setup", "teardown", "prepare_data", "configure_model", "configure_optimizers", "backward"),
    *("training_step", "validation_step", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"),
    *("lr_scheduler_step", "transfer_batch_to_device"),
)
NOT_HOOKS = {"on_gpu"}


def hooks_of(cls: type) -> list[str]:
    named = [name for name in dir(cls) if name.startswith("on_") and callable(getattr(cls, name, None))]
    return [*(name for name in named if name not in NOT_HOOKS), *(name for name in STEPS if hasattr(cls, name))]


def described(value: Any) -> str:
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    if value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, MultiTaskModule):
        return "module"
    if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler | Tensor):
        return type(value).__name__
    return "callable" if callable(value) else type(value).__name__


def counting(cls: type, calls: Counter[str], owner: str) -> type:
    """A subclass that counts each call of a hook, and its arguments, and goes on to the hook."""

    def counted(name: str) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[f"{owner}.{name}({', '.join(described(value) for value in (*args, *kwargs.values()))})"] += 1
            return getattr(super(found, self), name)(*args, **kwargs)

        return hook

    found = type("Counting", (cls,), {name: counted(name) for name in hooks_of(cls)})
    return found


def scheduled(module: MultiTaskModule) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
            "monitor": "val/loss/a",
            "interval": "epoch",
        },
    }


def stepwise(module: MultiTaskModule) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
            "interval": "step",
        },
    }


def module_in(mode: str, cls: type, accumulate: int = 1, clip: float | None = None) -> tuple[MultiTaskModule, Any]:
    """A module, and what the Trainer gets, in one mode or the other."""
    arguments: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    if mode == "manual":
        return small(cls=cls, **arguments), {}
    module = small(cls=cls)
    module.automatic_optimization = True
    return module, arguments


@pytest.mark.parametrize("configure", [scheduled, stepwise])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weighting", [None, StaticWeights({"a": 2.0}), MGDA(), MGDA(at="features")])
def test_every_hook(weighting: Any, accumulate: int, configure: Any) -> None:
    found = {}
    for mode in ("automatic", "manual"):
        calls: Counter[str] = Counter()
        cls = counting(type("Configured", (MultiTaskModule,), {"configure_optimizers": configure}), calls, "module")
        callback = counting(pl.Callback, calls, "callback")()
        module, arguments = module_in(mode, cls, accumulate, clip=0.5)
        fit(
            module,
            loader(*batches(4, 4, 2, 3, 4)),
            loader(*batches(2, 4)),
            callbacks=[callback, *([] if weighting is None else [weighting])],
            max_epochs=2,
            gradient_clip_algorithm="norm" if mode == "automatic" else None,
            **arguments,
        )
        found[mode] = calls
    steps = 2 * (5 if accumulate == 1 else 3)
    assert sum(count for call, count in found["manual"].items() if call.startswith("module.optimizer_step(")) == steps
    assert found["manual"] == found["automatic"]


class Warmup(MultiTaskModule):
    """Lightning's own recipe of a warm-up of the learning rate."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.trainer.global_step + 1) / 8) * 0.1


class EverySecondStep(MultiTaskModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class OwnClipping(MultiTaskModule):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(self.trainer.optimizers[0], gradient_clip_val=gradient_clip_val)
        for parameter in self.trunk.parameters():
            torch.nn.utils.clip_grad_value_(parameter, 0.01)


class ScaledBeforeTheStep(MultiTaskModule):
    """What changes gradients here is clipped afterwards."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.1)


class Shrinks:
    """A mixin that knows nothing of this package."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)


class MixedIn(Shrinks, OwnClipping):
    pass


class ZeroInPlace(MultiTaskModule):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class Decay(MultiTaskModule):
    """Changes parameters where an average of them is usually taken."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for parameter in self.heads.parameters():
                parameter.mul_(0.9)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("cls", [Warmup, EverySecondStep, OwnClipping, ScaledBeforeTheStep, MixedIn, ZeroInPlace])
def test_overridden_hooks_have_their_effect(cls: type, clip: float | None) -> None:
    found, plain = {}, small(optimizer=sgd, gradient_clip_val=clip)
    fit(plain, loader(*batches(4, 4, 2, 3, 4)), callbacks=[StaticWeights({"a": 2.0})])
    for mode in ("automatic", "manual"):
        module, arguments = module_in(mode, cls, clip=clip)
        module._make_optimizer = sgd
        trainer = fit(module, loader(*batches(4, 4, 2, 3, 4)), callbacks=[StaticWeights({"a": 2.0})], **arguments)
        found[mode] = flat_parameters(module)
        assert trainer.global_step == 5
    torch.testing.assert_close(found["manual"], found["automatic"], rtol=0, atol=1e-7)
    assert (cls is ZeroInPlace) == torch.allclose(found["manual"], flat_parameters(plain), rtol=0, atol=1e-7)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_parameters_may_change_before_gradients_are_zeroed() -> None:
    module = small(cls=Decay)
    module.configure_optimizers = lambda: sgd(module.trunk.parameters())  # type: ignore[method-assign]
    before = torch.cat([p.detach().flatten() for p in module.heads.parameters()])
    fit(module, loader(*batches(4, 4)))
    found = torch.cat([p.detach().flatten() for p in module.heads.parameters()])
    torch.testing.assert_close(found, before * 0.81)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["on_before_optimizer_step", "optimizer_step"])
def test_hooks_that_an_instance_has_act_as_those_of_a_class(name: str, clip: float | None) -> None:
    def halved(module: Any, optimizer: Any) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    def raised(module: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] *= 1.5

    hook: Any = {"on_before_optimizer_step": halved, "optimizer_step": raised}[name]
    cls, found = type("Overriding", (MultiTaskModule,), {name: hook}), []
    for on_instance in (False, True):
        module = small(cls=MultiTaskModule if on_instance else cls, optimizer=sgd, gradient_clip_val=clip)
        if on_instance:
            setattr(module, name, functools.partial(hook, module))
        rates = TaskLearningRate(Importance({"a": 0.5, "b": 2.0}), shares_trunk=True)
        data = [*batches(4, 4), (torch.full((4, 3), torch.nan), batches(4)[0][1]), *batches(2, 3, seed=8)]
        with pytest.warns(UserWarning, match="Step 2 is skipped"):
            fit(module, loader(*data), callbacks=[StaticWeights({"a": 2.0}), rates])
        with pytest.warns(UserWarning, match="Step 2 is skipped"):  # wrapped once, however many fits there are
            fit(module, loader(*data), callbacks=[StaticWeights({"a": 2.0}), rates])
        found.append(flat_parameters(module))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_a_hook_of_an_instance_may_call_that_of_its_class() -> None:
    found = []
    for calls in (False, True):
        module = small(optimizer=sgd, gradient_clip_val=0.3)
        if calls:
            own = functools.partial(type(module).on_before_optimizer_step, module)
            module.on_before_optimizer_step = own  # type: ignore[method-assign]
        fit(module, loader(*batches(4, 4)))
        found.append(flat_parameters(module))
    assert torch.equal(*found)
