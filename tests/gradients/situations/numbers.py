"""Complex numbers, sparse gradients, several dtypes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.gradients.situations.base import SAMPLES, WIDTH, Loss, Net, Part, Situation, classification, regression


class Spectral(nn.Module):
    """Multiplies a spectrum by complex parameters, as Fourier operators do, and transforms back if asked."""

    def __init__(self, dtype: torch.dtype, *, back: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=dtype))
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfft(self.layer(x)) * self.filter
        back: Tensor = torch.fft.irfft(spectrum, n=WIDTH)
        return back if self.back else spectrum


class ComplexLinear(nn.Module):
    """A complex layer with complex features."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.to(self.layer.weight.dtype)).tanh()
        return result


class Magnitude(nn.Module):
    """A head that reads the parts of complex features."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * inputs, outputs)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.view_as_real(z).flatten(1).double())
        return result


class ComplexHead(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs, dtype=torch.complex128)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.layer(z.to(torch.complex128)).abs()
        return result


def complex_features(trunk: Part, inputs: int) -> functools.partial[Net]:
    heads: dict[str, Any] = {task: functools.partial(Magnitude, n, inputs) for task, n in (("a", 1), ("b", 3))}
    return functools.partial(Net, trunk=trunk, **heads)


def _rows(x: Tensor) -> Tensor:
    """Which rows of an embedding of 12 the inputs ask for."""
    return (x[:, :3].abs() * 4).long().clamp(0, 11)


class SparseTrunk(nn.Module):
    """Sums embeddings whose gradients are sparse; with a layer behind them if asked."""

    def __init__(self, *, layer: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(12, WIDTH, sparse=True)
        self.layer: nn.Module = nn.Linear(WIDTH, WIDTH) if layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.table(_rows(x)).mean(1)).tanh()
        return result


class SparseBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(12, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.table(_rows(x))
        return result


class SparseHead(nn.Module):
    """Multiplies the features by embeddings of the samples."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(3, WIDTH, sparse=True), nn.Linear(WIDTH, outputs)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.layer(z * self.table(torch.arange(len(z)) % 3))
        return result


class SparseAndDense(Net):
    """The table is read sparsely by task a and densely by task b's weight tying."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        scores = z @ self.trunk.get_parameter("table.weight").t()
        return {"a": regression(self.heads["a"](z), x), "b": classification(scores, x)}


class SparsePenalty(Net):
    """A penalty on rows of the table."""

    def penalties(self) -> dict[str, Tensor]:
        table = self.trunk.get_submodule("table")
        return {"rows": table(torch.tensor([0, 3])).pow(2).sum()}


class Two(nn.Module):
    """float64 below, float32 above."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.above(self.below(x).tanh().float())
        return result


class Casting(nn.Module):
    """A float32 trunk under float64 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.float()).tanh()
        return result


class Mixed(Net):
    """The trunk is, or ends, in float32; the heads read float64."""

    def add_parts(self) -> None:
        self.double()
        part = "above" if isinstance(self.trunk, Two) else "layer"
        self.trunk.get_submodule(part).float()

    def double(self) -> Mixed:
        """Convert the parts once: the trunk keeps what it was made."""
        if not getattr(self, "converted", False):
            self.converted = True
            super().double()
        return self

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x).double()
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class HalfLoss(Net):
    """Task a's loss is float32, task b's float64."""

    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        return {"a": found["a"].float(), "b": found["b"]}


class LossOfShapeOne(Net):
    def losses(self, x: Tensor) -> Loss:
        return {task: loss.reshape(1) for task, loss in super().losses(x).items()}


DOUBLE, SINGLE = torch.complex128, torch.complex64
SPECTRUM = WIDTH // 2 + 1
assert SAMPLES > 3, "some rows of the tables come twice"
NUMBERS = (
    Situation(
        "complex parameters",
        functools.partial(Net, trunk=functools.partial(Spectral, DOUBLE)),
        layer="trunk",
        is_last=False,
        clean=True,
    ),
    Situation(
        "complex features",
        complex_features(functools.partial(Spectral, DOUBLE, back=False), SPECTRUM),
        layer="trunk",
        is_last=False,
        clean=True,
    ),
    Situation(
        "complex layer and features",
        complex_features(functools.partial(ComplexLinear, DOUBLE), WIDTH),
        layer="trunk.layer",
        clean=True,
    ),
    Situation(
        "complex layer and features, complex64",
        complex_features(functools.partial(ComplexLinear, SINGLE), WIDTH),
        layer="trunk.layer",
        clean=True,
        tolerance=1e-5,
    ),
    Situation("complex head", functools.partial(Net, a=lambda: ComplexHead(1), b=lambda: ComplexHead(3)), clean=True),
    Situation("sparse table in the trunk", functools.partial(Net, trunk=SparseTrunk), layer="trunk.layer", clean=True),
    Situation(
        "sparse table alone",
        functools.partial(Net, trunk=functools.partial(SparseTrunk, layer=False)),
        layer="trunk.table",
        clean=True,
    ),
    Situation("sparse bag", functools.partial(Net, trunk=SparseBag), layer="trunk.table", clean=True),
    Situation("sparse table in a head", functools.partial(Net, a=lambda: SparseHead(1)), clean=True),
    Situation(
        "sparse tables everywhere",
        functools.partial(Net, trunk=SparseTrunk, a=lambda: SparseHead(1), b=lambda: SparseHead(3)),
        layer="trunk.table",
        is_last=False,
        clean=True,
    ),
    Situation(
        "sparse table, tied to a dense one",
        functools.partial(SparseAndDense, trunk=SparseTrunk),
        layer="trunk.table",
        is_last=False,
    ),
    Situation("sparse penalty", functools.partial(SparsePenalty, trunk=SparseTrunk), layer="trunk.layer", clean=True),
    Situation(
        "float32 trunk, float64 heads",
        functools.partial(Mixed, trunk=Casting),
        layer="trunk.layer",
        clean=True,
        tolerance=1e-5,
    ),
    Situation(
        "trunk of two dtypes", functools.partial(Mixed, trunk=Two), layer="trunk.above", clean=True, tolerance=1e-5
    ),
    Situation("losses of two dtypes", HalfLoss, clean=True, tolerance=1e-5),
    Situation("losses of shape [1]", LossOfShapeOne, clean=True),
)
