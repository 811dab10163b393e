"""The learning rates of the heads' groups, scaled for the length of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.learning_rates.parameter_groups import Rate, groups_of_heads, own_parameters
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.update import values_of_gradients


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
            return [task for task, _ in rates], torch.stack([torch.as_tensor(rate).reshape(()) for rate in effective])
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
        squares = torch.full((len(module.tasks),), torch.nan, device=module.device)
        if gradients:
            index = torch.tensor(owners, device=module.device)
            parts = torch.stack(_norms(gradients)).square().to(squares)
            squares = squares.index_fill(0, index, 0.0).index_add(0, index, parts)
        return squares.sqrt()


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    if isinstance(gradients[0], DTensor):
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    # Kernels for many tensors at once take one dtype; float32 holds the norms of half-precision gradients.
    widest = torch.promote_types(gradients[0].dtype, torch.float32)
    return list(torch._foreach_norm(gradients, 2, dtype=widest))
