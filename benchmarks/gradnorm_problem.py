"""GradNorm's toy: tasks that are much alike and whose targets have scales a hundred times apart.

f_k(x) = σ_k tanh((B + ε_k) x) with the numbers of B ~ N(0, 10) and ε_k ~ N(0, 3.5), taken as standard deviations, and x
uniform on the unit sphere; a four-layer ReLU trunk 100 wide, one affine head a task, squared loss.

Source: Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks, 2018,
arXiv:1711.02257, section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize
from torch.utils.data import IterableDataset

from lightning_mtl import MultiTaskModule, Task

Batch = tuple[Tensor, dict[str, Tensor]]
WIDTH = 100


class ScaledTasks(IterableDataset[Batch]):
    """The tasks of one seed; iterated, it yields fresh training batches, the same at each iteration.

    Args:
        scales: ``{task: σ}``.
        inputs: Length of x; the paper's is 250.
        outputs: Length of f(x); the paper's is 100.
        batch_size: Samples in a training batch.
        batches: How many there are.
        seed: Of B, ε, x and the model's first weights.
    """

    def __init__(
        self,
        scales: Mapping[str, float],
        *,
        inputs: int = 250,
        outputs: int = 100,
        batch_size: int = 200,
        batches: int,
        seed: int = 0,
    ) -> None:
        self.scales, self.inputs, self.outputs = dict(scales), inputs, outputs
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        generator = torch.Generator().manual_seed(seed)
        base = 10 * torch.randn(outputs, inputs, generator=generator)
        self.own = {task: base + 3.5 * torch.randn(outputs, inputs, generator=generator) for task in scales}

    def draw(self, number: int, generator: torch.Generator) -> Batch:
        x = normalize(torch.randn(number, self.inputs, generator=generator), dim=1)
        return x, {task: scale * torch.tanh(x @ self.own[task].T) for task, scale in self.scales.items()}

    def test_batch(self, number: int) -> Batch:
        """Samples that no training batch holds."""
        return self.draw(number, torch.Generator().manual_seed(-1 - self.seed))

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1_000_000 + self.seed)
        for _ in range(self.batches):
            yield self.draw(self.batch_size, generator)

    def model(self) -> MultiTaskModule:
        """The paper's network, with Adam's usual learning rate."""
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for width in (self.inputs, WIDTH, WIDTH, WIDTH):
            layers += [nn.Linear(width, WIDTH), nn.ReLU()]
        return MultiTaskModule(
            nn.Sequential(*layers),
            {task: nn.Linear(WIDTH, self.outputs) for task in self.scales},
            {task: Task(mse_loss) for task in self.scales},
            optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
        )


def losses_on(module: MultiTaskModule, batch: Batch) -> dict[str, float]:
    """Each task's loss on a batch, without a trace in the module."""
    with torch.no_grad():
        return {task: output.loss.item() for task, output in module.present_outputs(batch).items()}
