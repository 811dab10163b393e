"""The tasks' own learning rates reach the optimizer here for one optimizer step, and are told what it has shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.devices import numbers, send
from lightning_mtl.learning_rates.parameter_groups import Rate, groups_of_heads, own_parameters
from lightning_mtl.learning_rates.relatedness import aligned, of_all_ranks
from lightning_mtl.learning_rates.task_learning_rate import TaskLearningRate
from lightning_mtl.method.signals import Signals
from lightning_mtl.task import TaskOutput
from lightning_mtl.task.batches import is_per_task
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.update import optimizer_of, values_of_gradients
from lightning_mtl.training.window import Window


class GroupRates:
    """Multiplies what the schedulers have set, and puts it back after the step, so that nothing compounds."""

    def __init__(self) -> None:
        self._chosen: list[tuple[int, float]] = []
        self._scaled: list[tuple[dict[str, Any], Rate, Rate]] = []
        self._places: dict[str, list[int]] = {}
        self._num_groups = 0

    def check(self, module: TaskModule, optimizer: torch.optim.Optimizer, *, shares_trunk: bool) -> None:
        """Refuse an optimizer in which a head's learning rate is not its own.

        Raises:
            ValueError: If heads have no parameter group, or no parameter, of their own.
        """
        self.places(module, optimizer)
        bare = [task for task, parameters in own_parameters(module).items() if not parameters]
        if bare and not shares_trunk:
            raise ValueError(
                f"The heads of {bare} have no parameters of their own, so that these tasks have no learning rate; give "
                "each a head of its own, or scale the tasks' shares of the trunk's update, too, by shares_trunk=True."
            )

    def places(self, module: TaskModule, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
        """Where each head's groups stand; looked up again where a callback has added some, as to unfreeze a part."""
        # Groups are only ever added, so that their number tells whether the places still hold.
        if len(optimizer.param_groups) != self._num_groups:
            self._places = groups_of_heads(module, optimizer)
            self._num_groups = len(optimizer.param_groups)
        return self._places

    def choose(
        self, module: TaskModule, optimizer: torch.optim.Optimizer, multipliers: Sequence[float]
    ) -> tuple[list[str], Tensor]:
        """Decide what the next step scales.

        Returns:
            The tasks whose heads are in the optimizer, and their effective learning rates (of a head's first group).
        """
        places = self.places(module, optimizer)
        factors = dict(zip(module.tasks, multipliers, strict=True))
        self._chosen = [(index, factors[task]) for task, indices in places.items() for index in indices]
        rates = [(task, optimizer.param_groups[indices[0]]["lr"]) for task, indices in places.items() if indices]
        effective = [rate * factors[task] for task, rate in rates]
        if any(isinstance(rate, Tensor) for rate in effective):
            # Tensors may lie with the parameters of their groups, on several devices.
            own = [torch.as_tensor(rate).reshape(()).to(module.device) for rate in effective]
            return [task for task, _ in rates], torch.stack(own)
        return [task for task, _ in rates], torch.tensor(effective)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale what was chosen, for the optimizer's next step."""
        chosen, self._chosen = self._chosen, []
        for index, factor in chosen:
            group = optimizer.param_groups[index]
            before = group["lr"]
            # Never in place: groups may share one tensor.
            group["lr"] = before * factor
            self._scaled.append((group, before, group["lr"]))

    @contextmanager
    def putting_back(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Put the learning rates back at once after the step inside, also where it is skipped or fails."""
        handle = optimizer.register_step_post_hook(lambda *_: self._put_back())
        try:
            yield
        finally:
            handle.remove()
            self._put_back()

    def _put_back(self) -> None:
        for group, before, scaled in self._scaled:
            if group["lr"] is scaled:  # or somebody has set another since
                group["lr"] = before
        self._scaled = []

    def gradient_norms(self, module: TaskModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """The norm of each head's gradient as it is now, ``[K]``; nan for a head without one.

        Args:
            module: The model.
            optimizer: The optimizer, whose groups say what belongs to a head.
        """
        owners: list[int] = []
        gradients: list[Tensor] = []
        for position, places in enumerate(self.places(module, optimizer).values()):
            for place in places:
                values = values_of_gradients(optimizer.param_groups[place]["params"])
                owners += [position] * len(values)
                gradients += values
        # nan, not 0, for a head without a gradient: it was not measured, and factors leave it out.
        squares = torch.full((len(module.tasks),), torch.nan, device=module.device)
        if gradients:
            index = numbers(owners, module.device)
            parts = torch.stack([norm.to(module.device) for norm in _norms(gradients)]).square().to(squares)
            squares = squares.index_fill(0, index, 0.0).index_add(0, index, parts)
        return squares.sqrt()


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    if isinstance(gradients[0], DTensor):
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    # Kernels for many tensors at once take one dtype; float32 holds the norms of half-precision gradients.
    widest = torch.promote_types(gradients[0].dtype, torch.float32)
    return list(torch._foreach_norm(gradients, 2, dtype=widest))


class Steering:
    """Takes a step's multipliers to the optimizer, and what the step has shown back.

    Args:
        rates: The callback that gives the multipliers.
        module: What is trained, its optimizer made.

    Raises:
        ValueError: If heads have no parameter groups of their own.

    Attributes:
        groups: The optimizer's groups of the heads.
        effective: The tasks whose heads are in the optimizer, and the learning rates of the newest step.
    """

    def __init__(self, rates: TaskLearningRate, module: TaskModule) -> None:
        self.rates, self.groups = rates, GroupRates()
        self.effective: tuple[list[str], Tensor] | None = None
        self.groups.check(module, optimizer_of(module).optimizer, shares_trunk=rates.shares_trunk)

    def shares(self, module: TaskModule, step: int) -> Tensor | None:
        """What multiplies the tasks' weights in the shared gradient of a step, ``[K]``; None for 1."""
        return send(self.rates.current(step), module.device, torch.float32) if self.rates.shares_trunk else None

    def collect(self, module: TaskModule, window: Window, batch: object, outputs: Mapping[str, TaskOutput]) -> None:
        """Keep what is asked for of a micro-batch's targets and predictions."""
        if not self.rates.collects:
            return
        if is_per_task(module.in_known_form(batch), module.tasks):
            raise ValueError(
                "The relatedness of tasks is measured on targets of the same samples, and each task has samples of its "
                "own where a batch is {task: (inputs, target)}; measure Relatedness('gradient_cosine')."
            )
        for what, limit in self.rates.collects.items():
            newest = aligned(outputs, tuple(module.tasks), what, limit, module.device)
            window.samples.setdefault(what, []).append(newest)

    def choose(self, module: TaskModule, multipliers: Sequence[float]) -> None:
        """Decide what the next step multiplies."""
        self.rates.check_known(multipliers)
        self.effective = self.groups.choose(module, optimizer_of(module).optimizer, multipliers)

    def before_step(self, module: TaskModule, optimizer: torch.optim.Optimizer) -> None:
        """Show the heads' gradients, finite ones, before they are clipped."""
        if self.rates.reads_heads:
            self.rates.observe_heads(self.groups.gradient_norms(module, optimizer))

    def observe(self, window: Window, signals: Signals) -> None:
        """Show what else the step has measured."""
        self.rates.observe(signals, window.positions(signals.tasks))
        for what, values in window.samples.items():
            self.rates.observe_samples(what, of_all_ranks(values, window.ranks))
