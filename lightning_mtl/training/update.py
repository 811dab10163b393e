"""The gradients reach the optimizer here: checked, synchronized and clipped."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.devices import fetch
from lightning_mtl.method.signals import Signals
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.window import Window
from lightning_mtl.training.wrapping import Hook


def optimizer_of(module: TaskModule) -> LightningOptimizer:
    """The one optimizer: several are refused at setup."""
    return cast("LightningOptimizer", module.optimizers())


class NotFiniteError(RuntimeError):
    """Is raised where too many steps in a row were skipped because a loss or a gradient is not finite."""


class Update:
    """The optimizer's part of a step, and the steps that it does without because something is not finite.

    Attributes:
        awaited: The window whose backward pass Lightning is about to run, in automatic optimization.
        drops: Whether the newest step is not to be taken.
        seen: Whether somebody has looked at the newest step's gradients; an optimizer with a closure comes by again.
        skipped: How many steps of this fit were skipped.
        skipped_in_a_row: How many of them were the last ones.
        returned: What the newest batch returned to a subclass's ``training_step``, in manual optimization.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a fit."""
        self.skipped = self.skipped_in_a_row = 0
        self.awaited: Window | None = None
        self.returned: Tensor | None = None
        self.drops, self.seen = False, True

    def look(
        self, module: TaskModule, signals: Signals | None, multipliers: Tensor | None
    ) -> tuple[bool, Signals | None, list[float]]:
        """Read, by one wait for the device, all that the host has to know before the optimizer's step.

        Returns:
            Whether losses and gradients are finite; the signals with the losses as the host knows them; and the
            multipliers of the tasks' own learning rates, where there are some.

        Raises:
            NotFiniteError: If too many steps were skipped in a row.
        """
        doubtful = torch.zeros((), device=module.device)
        if not module.automatic_optimization:
            doubtful = finite_if_all(optimizer_of(module).param_groups, doubtful)
        values = {"doubtful": doubtful} if multipliers is None else {"doubtful": doubtful, "multipliers": multipliers}
        if signals is not None:
            # A sum is finite only if all of it is; the gradients' norm speaks for what was measured of them, too.
            losses = signals.losses
            values |= {"doubtful": doubtful.to(losses.device) + losses.sum(), "losses": losses}
            if module.automatic_optimization and signals.norms is not None:
                values["norms"] = (signals.norms if signals.host_norms is None else signals.host_norms).sum()
        if module.device.type != "cpu":
            values = dict(zip(values, fetch(*values.values()), strict=True))
        self.drops = not all(math.isfinite(float(values[name])) for name in ("doubtful", "norms") if name in values)
        if signals is not None:
            signals = replace(signals, host_losses=values["losses"])
        if self.drops:
            self._skip(module, signals)
        else:
            self.skipped_in_a_row = 0
        return not self.drops, signals, values["multipliers"].tolist() if "multipliers" in values else []

    def _skip(self, module: TaskModule, signals: Signals | None) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        culprits = "a gradient"
        if signals is not None:
            broken = torch.isfinite(signals.losses_on_cpu()).logical_not().tolist()
            named = [repr(task) for task, is_broken in zip(signals.tasks, broken, strict=True) if is_broken]
            culprits = f"the loss of {', '.join(named)}" if named else culprits
        step = module.trainer.global_step
        if self.skipped == 1:
            hint = "" if culprits == "a gradient" else " Where a missing label is NaN, say Task(missing=torch.nan)."
            rank_zero_warn(f"Step {step} is skipped: {culprits} is not finite.{hint} Later ones: see the fit's end.")
        if self.skipped_in_a_row > module.max_skipped_steps:
            raise NotFiniteError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last at step {step}: {culprits} is not "
                "finite. Lower the learning rate, mend the loss, or raise max_skipped_steps."
            )

    def judge(self, module: TaskModule, optimizer: torch.optim.Optimizer, steering: Any) -> None:  # noqa: ANN401
        """Look at a step's gradients before they are clipped.

        In automatic optimization, gradients that are not finite are taken away from an optimizer that Lightning steps
        whatever they are.
        """
        if module.automatic_optimization and (self.drops or not _are_finite(optimizer, module.device)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif steering is not None and not self.seen:
            steering.before_step(module, optimizer)
        self.seen = True
        if steering is not None:
            steering.groups.apply(optimizer)

    def step(
        self,
        module: TaskModule,
        batch_idx: int,
        loss: Tensor | None,
        again: Callable[[], Tensor | None],
        *,
        scaler: object,
        finite: bool,
    ) -> None:
        """Step the optimizer through the module's hooks.

        Args:
            module: What is trained.
            batch_idx: The place of the step's last batch in its epoch.
            loss: The step's loss, whose gradients the parameters have.
            again: Computes loss and gradients once more, for an optimizer that calls its closure more than once.
            scaler: The gradient scaler of half precision, if there is one.
            finite: Whether gradients and losses are.
        """
        optimizer = optimizer_of(module)
        if finite or scaler is not None:
            # A scaler has to see gradients that are not finite: it skips the step, and lowers its factor.
            known = [loss]

            @torch.enable_grad()
            def closure() -> Tensor | None:
                return known.pop() if known else again()

            self.seen = not finite
            # Where Lightning's manual loop counts steps. As in automatic optimization, one is counted once the hook is
            # over, whatever the hook makes of it.
            begin, end = optimizer._on_before_step, optimizer._on_after_step
            optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
            begin()
            try:
                module.optimizer_step(module.trainer.current_epoch, batch_idx, optimizer, closure)
            finally:
                optimizer._on_before_step, optimizer._on_after_step = begin, end
            end()
        else:
            optimizer.zero_grad()


class Taking(Protocol):
    """What takes a module's steps."""

    update: Update
    cast: Any  # it knows the steering, which knows this file

    def find_cast(self, module: TaskModule) -> Any:  # noqa: ANN401
        """Look for who takes part."""


def putting_rates_back(step: Hook) -> Hook:
    """Let ``optimizer_step`` leave the learning rates as it found them, where tasks have their own."""

    @functools.wraps(step)
    def optimizer_step(
        self: OptimizerHooks,
        epoch: int,
        batch_idx: int,
        optimizer: LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the hook returns
        taking = self.optimization
        steering = (taking.find_cast(self) if self.automatic_optimization else taking.cast).steering
        if steering is None:
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)
        with steering.groups.putting_back(optimizer.optimizer):
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)

    return cast("Hook", optimizer_step)


def judged_and_clipped(before_step: Hook) -> Hook:
    """Let ``on_before_optimizer_step`` see finite gradients, and clip what it leaves, as automatic optimization does.

    Lightning calls this hook last before an optimizer's step, with gradients free of a scaler's factor. In manual
    optimization it does not clip after it, and no callback comes that late.
    """

    @functools.wraps(before_step)
    def on_before_optimizer_step(self: OptimizerHooks, optimizer: torch.optim.Optimizer) -> None:
        if vars(self).get("_judging"):  # a call of super()
            before_step(self, optimizer)
            return
        self.__dict__["_judging"] = True
        try:
            self.optimization.update.judge(self, optimizer, self.optimization.cast.steering)
            before_step(self, optimizer)
        finally:
            self.__dict__["_judging"] = False
        if not self.automatic_optimization:
            self.configure_gradient_clipping(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    return cast("Hook", on_before_optimizer_step)


WRAPPERS = {"optimizer_step": putting_rates_back, "on_before_optimizer_step": judged_and_clipped}


class OptimizerHooks(TaskModule):
    """Lightning's hooks around the optimizer, which the module calls itself in manual optimization."""

    optimization: Taking

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        for name, wrap in WRAPPERS.items():
            hook = getattr(cls, name)  # of the class itself, or of a mixin, which knows nothing of this one
            if getattr(hook, "__code__", None) is not vars(OptimizerHooks)[name].__code__:
                setattr(cls, name, wrap(hook))

    optimizer_step = putting_rates_back(pl.LightningModule.optimizer_step)
    on_before_optimizer_step = judged_and_clipped(pl.LightningModule.on_before_optimizer_step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, sparse gradients too, to what the module's arguments or the Trainer's say."""
        if gradient_clip_val is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            _clip_sparse(parameters, gradient_clip_val, gradient_clip_algorithm or "norm")
        elif gradients:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def finite_if_all(groups: Iterable[Mapping[str, Any]], zero: Tensor) -> Tensor:
    """A number that is finite only if all gradients are that an optimizer is about to use; ``zero`` without any."""
    gradients = values_of_gradients([parameter for group in groups for parameter in group["params"]])
    if not gradients:
        return zero
    kinds = {(type(gradient), gradient.dtype, gradient.device) for gradient in gradients}
    if len(kinds) == 1 and not isinstance(gradients[0], DTensor):
        # As torch computes the norm of all, without its sorting by kind: the gradients are read once, and no more.
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).sum()
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _are_finite(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    return bool(finite_if_all(optimizer.param_groups, torch.zeros((), device=device)).isfinite())


def _clip_sparse(parameters: Sequence[Tensor], limit: float, algorithm: str) -> None:
    """Clip as torch does, which knows no norm of sparse gradients."""
    values = values_of_gradients(parameters)
    if algorithm == GradClipAlgorithmType.VALUE:
        for value in values:
            value.clamp_(-limit, limit)
        return
    factor = (limit / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor)


def values_of_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The numbers that the parameters' gradients hold, in their own memory; of sparse gradients each row once."""
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that comes twice counts by its sum
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    return values
