"""Problems of ``units.py`` whose models are no trunk with heads: 139 schools, and a differential equation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.units_problems import FEATURES, Errors, Problem, Setting, relative_error, trunk
from equations import Batches, Helmholtz, PhysicsInformed
from lightning_mtl import BalancedModule, Task


class School(Problem["Examinations"]):
    """139 London schools' examinations, a regression each; a seed divides each school's pupils 70 : 10 : 20.

    A batch has as many pupils of each school, drawn with replacement, so that each has a loss in each step.
    """

    error = "error over standard deviation, %"
    steps, batch = 100, 8
    rates: ClassVar = {"Adam": (1e-3, 3e-3, 1e-2), "SGD": (1e-4, 1e-3, 1e-2)}
    every_n_steps = 10

    def __init__(self, schools: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.schools = schools
        self.tasks = tuple(f"school_{number + 1}" for number in range(len(schools)))
        self.scaled = self.tasks[0]

    @functools.cache  # noqa: B019
    def parts(self, seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Each school's pupils for training, validation and test, inputs standardized by the first."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
        for inputs, marks in self.schools:
            rows = torch.randperm(len(marks), generator=generator)
            sizes = [round(0.7 * len(rows)), round(0.1 * len(rows))]
            for name, own in zip(found, rows.split([*sizes, len(rows) - sum(sizes)]), strict=True):
                found[name].append((inputs[own], marks[own]))
        learned = torch.cat([inputs for inputs, _ in found["train"]])
        mean, std = learned.mean(0), learned.std(0).clamp(min=1e-6)
        return {name: [((x - mean) / std, y) for x, y in pairs] for name, pairs in found.items()}

    def module(self, setting: Setting, seed: int) -> Examinations:
        return Examinations(self.tasks, self.parts(seed)["train"], setting)

    def batches(self, seed: int) -> Any:  # noqa: ANN401
        return DataLoader(Pupils(self.parts(seed)["train"], self.batch, self.steps, seed), batch_size=None)

    def errors(self, module: Examinations, seed: int) -> Errors:
        found = {}
        for name in ("val", "test"):
            pairs = self.parts(seed)[name]
            predictions = [module.marks(school, inputs) for school, (inputs, _) in enumerate(pairs)]
            found[name] = relative_error(torch.cat(predictions), torch.cat([marks for _, marks in pairs]))
        return Errors(found["val"], found["test"], relative_error(predictions[0], pairs[0][1]))


class Pupils(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches ``([K, n, inputs], [K, n])`` of n pupils of each of K schools."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], number: int, steps: int, seed: int) -> None:
        self.pairs, self.number, self.steps, self.seed = pairs, number, steps, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = torch.tensor([len(marks) for _, marks in self.pairs])
        inputs, marks = (torch.cat([pair[which] for pair in self.pairs]) for which in (0, 1))
        first = (sizes.cumsum(0) - sizes)[:, None]
        for _ in range(self.steps):
            own = (torch.rand(len(sizes), self.number, generator=generator) * sizes[:, None]).long()
            yield inputs[first + own], marks[first + own]


class Examinations(BalancedModule):
    """A trunk that all schools share, and a linear head each, all heads in two tensors: 139 modules would be slow."""

    def __init__(self, tasks: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]], setting: Setting) -> None:
        losses = {task: Task(setting.loss(task, tasks[0]), loss_scale=setting.divisor) for task in tasks}
        super().__init__(losses, optimizer=setting.make_optimizer)
        self.trunk = trunk(pairs[0][0].shape[1])
        self.heads = nn.Linear(FEATURES, len(tasks))
        means, stds = torch.zeros(len(tasks)), torch.ones(len(tasks))
        if setting.standardized:
            means = torch.stack([marks.mean() for _, marks in pairs])
            stds = torch.stack([marks.std().clamp(min=1e-6) for _, marks in pairs])
        self.means, self.stds = means, stds
        self.factors = torch.tensor([setting.scale if task == tasks[0] else 1.0 for task in tasks])

    def shared_parameters(self) -> list[nn.Parameter]:
        """The trunk's: a school has a row of its own in the heads' tensors."""
        return list(self.trunk.parameters())

    def task_losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, marks = batch
        features = self.trunk(inputs.flatten(0, 1)).unflatten(0, marks.shape)
        predictions = torch.baddbmm(self.heads.bias[:, None, None], features, self.heads.weight[:, :, None])[..., 0]
        targets = (marks - self.means[:, None]) / self.stds[:, None]
        losses = self.factors * (predictions - targets).square().mean(1)
        return dict(zip(self.tasks, losses.unbind(), strict=True))

    def marks(self, school: int, inputs: Tensor) -> Tensor:
        """Predict a school's pupils, in marks."""
        standardized: Tensor = self.trunk(inputs) @ self.heads.weight[school] + self.heads.bias[school]
        return standardized * self.stds[school] + self.means[school]


class Waves(Problem[PhysicsInformed]):
    """Helmholtz' equation of ``physics.py``, the boundary's loss scaled; chosen and compared by the error itself."""

    error = "relative L2 error, %"
    tasks, scaled, steps = Helmholtz.tasks, "boundary", 1_000
    rates: ClassVar = {"Adam": (1.6e-3, 5e-3, 1.6e-2), "SGD": (1e-5, 1e-4, 1e-3)}
    standardizes = False

    def module(self, setting: Setting, seed: int) -> PhysicsInformed:
        del seed
        return ScaledWaves(self.steps, setting)

    def batches(self, seed: int) -> Any:  # noqa: ANN401
        return DataLoader(Batches(Helmholtz(), self.steps, seed), batch_size=None)

    def errors(self, module: PhysicsInformed, seed: int) -> Errors:
        del seed
        error = 100 * module.error()
        return Errors(error, error, error)


class ScaledWaves(PhysicsInformed):
    """The network of ``physics.py`` with the optimizer of a setting, its rate falling as there."""

    def __init__(self, steps: int, setting: Setting) -> None:
        super().__init__(Helmholtz(), steps, scales={"boundary": setting.scale}, loss_scale=setting.divisor)
        self.setting = setting

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's dictionary
        optimizer = self.setting.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
