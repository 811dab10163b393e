"""Gramians without rows against rows: layers of all kinds, used in all ways, in float64, float32 and half precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.split import Split
from lightning_mtl.gradients.trunk_gramian import TrunkGramian, layers_of
from lightning_mtl.weighting import MGDA
from tests.small import batch, small
from tests.training import fit, loader

Losses = Sequence[Tensor]
WEIGHTS = torch.tensor([0.3, -1.7, 0.6], dtype=torch.float64)


def engine_of(losses: Losses, shared: Sequence[Tensor], others: Sequence[Tensor] = ()) -> TrunkGramian:
    names = [f"task{k}" for k in range(len(losses))]
    engine = TrunkGramian(names, shared, others, Ranks.alone(), [])
    engine.add(MicroBatch(names, list(losses), None, Split(), [None] * len(losses)), last=True)
    engine.close(torch.stack([loss.detach() for loss in losses]), None)
    return engine


def rows_of(losses: Losses, shared: Sequence[Tensor]) -> Tensor:
    """The tasks' gradients, one call of autograd each, in float64."""
    rows = []
    for loss in losses:
        found: Any = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
        rows.append(torch.cat([(g.to_dense() if g.is_sparse else g).double().flatten() for g in pieces]))
    return torch.stack(rows)


def check(losses: Losses, shared: Sequence[Tensor], tolerance: float, *, layers: int, cancels_to: float = 1.0) -> None:
    """Gramian and direction, with an error of the Gramian relative to the sizes of the gradients themselves."""
    rows = rows_of(losses, shared)
    found = layers_of(losses, shared, len(losses))[0]
    assert len(found) == layers
    engine = engine_of(losses, shared)
    measured = engine.measure("gramian").gramian
    assert measured is not None
    scale = rows.norm(dim=1)
    assert (measured - rows @ rows.T).abs().le(tolerance * scale * scale[:, None]).all()
    for parameter in shared:
        parameter.grad = None
    engine.surrogate_loss(WEIGHTS[: len(losses)]).backward()
    direction = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.to_dense().flatten() for p in shared])
    expected = WEIGHTS[: len(losses)] @ rows
    limit = tolerance * (WEIGHTS[: len(losses)].abs() @ scale) / cancels_to
    assert (direction.double() - expected).norm() <= limit


def tensors(*shape: int, count: int = 1, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return found if count > 1 else found[0]


class Twice(nn.Module):
    """One layer used at two places, its bias only where both are."""

    def __init__(self, *, alike: bool) -> None:
        super().__init__()
        self.layer, self.alike = nn.Linear(6, 6), alike

    def forward(self, x: Tensor) -> Tensor:
        second = self.layer(x).tanh()
        return self.layer(second) if self.alike else F.linear(second, self.layer.weight)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


class Functional(nn.Module):
    """Weights used as they lie, transposed twice, within addmm, and beside a product."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.plain = nn.Parameter(tensors(6, 6)), nn.Parameter(tensors(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, :4], (x @ self.square.t().t()).sin(), self.plain)


class Tables(nn.Module):
    """Tables with a row that has no gradient, read twice; one of them is the decoder, too."""

    def __init__(self, *, sparse: bool = False, decoder: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=2, sparse=sparse)
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        read = self.table(torch.tensor([[1, 2, 1], [7, 1, 2]])).sin().mean(1) + self.table(torch.tensor([7, 2])).cos()
        found: Tensor = x[:2] * read
        return found @ self.table.weight.T if self.decoder else found


class Bags(nn.Module):
    """Bags of several sizes, one of them empty, read a second time as a matrix."""

    def __init__(self, mode: str, *, weighted: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 6, mode=mode, **arguments)
        self.factors = nn.Parameter(tensors(6)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        starts = [0, 3, 3, 6] if self.table.include_last_offset else [0, 3, 3]
        indices = torch.tensor([1, 2, 1, 8, 2, 3])
        first = self.table(indices, torch.tensor(starts), per_sample_weights=self.factors)
        second = self.table(indices.view(3, 2).int(), per_sample_weights=None if self.factors is None else x[:3, :2])
        found: Tensor = x * first.sin() + second.cos()
        return found


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.contiguous(memory_format=torch.channels_last))
        return found


class Index(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argsort(0)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    layer.get_parameter(name).requires_grad_(False)
    return layer


# A model, the shape of its input, and how many of its layers have a short form.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "vector": (lambda: nn.Linear(6, 4), (6,), 1),
    "matrix": (lambda: nn.Linear(6, 4), (3, 6), 1),
    "tokens": (lambda: nn.Linear(6, 4), (2, 3, 2, 6), 1),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6), 1),
    "another order of memory": (lambda: nn.Sequential(Turned(), nn.Linear(3, 4)), (2, 3, 6), 1),
    "frozen bias": (lambda: frozen(nn.Linear(6, 4), "bias"), (3, 6), 1),
    "frozen weight": (lambda: frozen(nn.Linear(6, 4), "weight"), (3, 6), 0),
    "twice": (lambda: Twice(alike=True), (3, 6), 1),
    "twice, one bias": (lambda: Twice(alike=False), (3, 6), 1),
    "functional": (Functional, (3, 6), 2),
    "table": (Tables, (3, 6), 1),
    "sparse table": (lambda: Tables(sparse=True), (3, 6), 1),
    "tied table": (lambda: Tables(decoder=True), (3, 6), 0),
    "scaled table": (lambda: nn.Sequential(Index(), nn.Embedding(4, 2, scale_grad_by_freq=True)), (3,), 0),
    "bags, sums": (lambda: Bags("sum"), (3, 6), 1),
    "bags, sparse sums with a last offset": (lambda: Bags("sum", sparse=True, include_last_offset=True), (3, 6), 1),
    "bags, sums but of one row": (lambda: Bags("sum", padding_idx=2), (3, 6), 1),
    "bags, weighted sums": (lambda: Bags("sum", weighted=True), (3, 6), 1),
    "bags, weighted sums but of one row": (lambda: Bags("sum", weighted=True, padding_idx=1), (3, 6), 1),
    "bags, means": (lambda: Bags("mean"), (3, 6), 1),
    "bags, means but of one row": (lambda: Bags("mean", padding_idx=2, include_last_offset=True), (3, 6), 1),
    "bags, sparse means": (lambda: Bags("mean", sparse=True), (3, 6), 1),
    "bags, largest": (lambda: Bags("max"), (3, 6), 0),
    "bags, scaled": (lambda: Bags("sum", scale_grad_by_freq=True), (3, 6), 0),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), (2, 3, 8), 4),
    "gates": (lambda: nn.GRUCell(6, 4), (3, 6), 2),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 6), 1),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), (1, 2), padding=(2, 0), dilation=(2, 1)), (2, 2, 6, 5), 1),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 2, 5, 4), 1),
    "channels last": (ChannelsLast, (2, 2, 5, 4), 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 3, 2), 1),
    "no batch": (lambda: nn.Conv2d(2, 3, 2), (2, 4, 4), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 0),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (3, 6), 0),
}


@pytest.mark.usefixtures("every_layer")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind(name: str) -> None:
    make, shape, layers = LAYERS[name]
    torch.manual_seed(1)
    model = make().double()
    z = model(tensors(*shape))
    # The second task reads a part, the third is constant: a row of zeros.
    losses = [z.sin().mean(), z.flatten()[: z.numel() // 2].square().sum(), (z * 0.0).sum()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check(losses, trained, 1e-12, layers=layers)


@pytest.mark.usefixtures("every_layer")
@pytest.mark.parametrize("seed", range(20))
def test_random_bags(seed: int) -> None:
    random = Random(seed)
    torch.manual_seed(seed)
    mode, last, rows = random.choice(["sum", "mean"]), random.random() < 0.4, random.randint(1, 12)
    padding = random.randrange(-rows, rows) if random.random() < 0.5 else None
    table = nn.EmbeddingBag(rows, random.randint(1, 5), mode=mode, include_last_offset=last, padding_idx=padding)
    table.double()
    read = []
    for _ in range(random.randint(1, 3)):
        number = random.randint(1, 9)
        starts = sorted([0, *(random.randint(0, number) for _ in range(3))]) + [number] * last
        factors = tensors(number) if mode == "sum" and random.random() < 0.5 else None
        read.append(table(torch.randint(rows, (number,)), torch.tensor(starts), per_sample_weights=factors).sin())
    losses = [torch.stack([(z * torch.randn_like(z)).sum() for z in read[k % 2 :] or read]).sum() for k in range(3)]
    check(losses, [table.weight], 1e-12, layers=1)


@pytest.mark.usefixtures("every_layer")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast(precision: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    x = tensors(3, 6).float()
    with torch.autocast("cpu", dtype=precision):
        z = model(x)
    check([z.float().sin().mean(), z.float().square().sum()], list(model.parameters()), 2e-2, layers=2)


@pytest.mark.parametrize("by", [1.0, 1e-2, 1e-3])
def test_nearly_stationary_points_are_as_exact_as_rows(by: float) -> None:
    """Where the samples' gradients cancel to a small part of their size."""
    torch.manual_seed(2)
    layer, half = nn.Linear(512, 512), torch.randn(64, 512)
    # Each sample comes twice, and its gradient a second time with the other sign, up to a small part.
    z = layer(torch.cat([half, half]))
    losses = []
    for _ in range(3):
        gradient = torch.randn(64, 512)
        losses.append((z * torch.cat([gradient, -gradient + by * torch.randn(64, 512)])).sum())
    check(losses, list(layer.parameters()), 3e-5, layers=1, cancels_to=by)


def test_a_table_needs_no_rows_where_few_of_its_own_are_read() -> None:
    losses = [nn.Embedding(100, 8)(torch.arange(n)).sum() for n in (24, 26)]
    bags = [nn.EmbeddingBag(100, 8)(torch.arange(n).view(2, -1)).sum() for n in (24, 26)]
    for few, many in (losses, bags):
        assert [len(layers_of([loss], list(reached_leaves([loss])), 2)[0]) for loss in (few, many)] == [1, 0]


def test_what_goes_without_rows_is_told_once_a_fit(caplog: pytest.LogCaptureFixture, every_layer: None) -> None:
    model = small()
    with caplog.at_level("DEBUG", logger="lightning_mtl.gradients.trunk_gramian"):
        fit(model, loader(batch(8), batch(8)), callbacks=[MGDA()], max_epochs=2)
    weights = sum(parameter.numel() for parameter in model.trunk.parameters())
    [line] = [record.getMessage() for record in caplog.records if record.name.endswith("trunk_gramian")]
    assert f"layers measured without rows ({weights} parameters), rows of 0 parameters" in line
