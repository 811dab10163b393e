"""Second passes put plain attributes back: counters, tensors and containers of a module, as they put buffers back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_mtl.monitors import TaskAffinity
from lightning_mtl.training.snapshots import Snapshot
from lightning_mtl.weighting import FAMO
from tests.small import batches, small
from tests.training import fit, flat_parameters, loader


class Remembering(nn.Module):
    """A layer with an annealed temperature, a running mean, a history and a cache, none of them a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.calls, self.mean = 0, torch.zeros(4)
        self.history: list[float] = []
        self.by_size: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = self.layer(x) * min(1.0, self.calls / 10) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        self.history.append(float(z.detach().mean()))
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        self.newest = z
        return torch.tanh(z)


def trained(*callbacks: Callback) -> Any:
    module = small()
    torch.manual_seed(3)
    module.trunk = Remembering()
    fit(module, loader(*batches(4, 5, 6, 4)), callbacks=list(callbacks))
    return module


@pytest.mark.parametrize("make", [FAMO, lambda: TaskAffinity(every_n_steps=1, exact=True, figure=False)])
def test_attributes_are_what_one_pass_a_step_makes_them(make: Callable[[], Callback]) -> None:
    trunk, plain = trained(make()).trunk, trained().trunk
    assert trunk.calls == len(trunk.history) == 4
    assert trunk.by_size == {4: 2, 5: 1, 6: 1}
    if make is not FAMO:
        assert trunk.history == plain.history
        assert all(torch.equal(a, b) for a, b in zip(trunk.parameters(), plain.parameters(), strict=True))


class WritingInPlace(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.mean += 1
        return super().forward(x)


def test_a_tensor_written_into_is_refused() -> None:
    module = small()
    module.trunk = WritingInPlace()
    with pytest.raises(ValueError, match=r"WritingInPlace writes into the tensor 'mean' in place.* register it as a"):
        fit(module, loader(*batches(4, 4)), callbacks=[FAMO()])


class Shortening(nn.Module):
    """A table whose rows every forward pass shortens to its ``max_norm``."""

    def __init__(self, kind: type[nn.Embedding | nn.EmbeddingBag]) -> None:
        super().__init__()
        self.table, self.layer = kind(5, 4, max_norm=0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table((x.abs() * 2).long().clamp(max=4))
        return torch.tanh(self.layer(found if found.ndim == 2 else found.mean(1)))


class Moved(Callback):
    """How far parameters are moved by anything but the optimizer, after its step; and where they end."""

    def __init__(self) -> None:
        self.distances: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def keep(*_: Any) -> None:
            self.stepped = flat_parameters(pl_module)

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.parameters = flat_parameters(pl_module)
        self.distances.append(float((self.parameters - self.stepped).abs().max()))


def moved(trunk: Callable[[], nn.Module], *callbacks: Callback) -> Moved:
    module, moves = small(), Moved()
    torch.manual_seed(3)
    module.trunk = trunk()
    fit(module, loader(*batches(4, 5, 6, 4)), callbacks=[*callbacks, moves])
    return moves


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("make", [FAMO, lambda: TaskAffinity(every_n_steps=1, exact=True, figure=False)])
def test_tables_that_a_pass_shortens_are_as_the_optimizer_left_them(make: Callable[[], Callback], kind: Any) -> None:
    trunk = functools.partial(Shortening, kind)
    found = moved(trunk, make())
    assert found.distances == [0.0] * 4
    if make is not FAMO:
        assert torch.equal(found.parameters, moved(trunk).parameters)


class Normalizing(nn.Module):
    """Prototypes that every forward pass brings to length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.copy_(nn.functional.normalize(self.layer.weight))
        return torch.tanh(self.layer(x))


def test_a_parameter_written_into_is_refused_where_a_second_pass_would_write_too() -> None:
    with pytest.raises(ValueError, match=r"writes into the parameter 'trunk.layer.weight' in place.*'next_batch'"):
        moved(Normalizing, FAMO())
    assert moved(Normalizing, FAMO(losses_after="next_batch")).distances == [0.0] * 4


def test_new_attributes_go_and_lost_ones_return() -> None:
    module = Remembering()
    before = Snapshot(module, torch.device("cpu"))
    module(torch.ones(2, 3))
    del module.by_size
    before.put_back()
    assert not hasattr(module, "newest")
    assert module.by_size == {}
    assert module.history == []
