"""Tasks of every kind in one model, with losses of torch's and metrics of torchmetrics', labeled fully or in part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_embedding_loss,
    cross_entropy,
    huber_loss,
    l1_loss,
    smooth_l1_loss,
    triplet_margin_loss,
)
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelAccuracy

from lightning_mtl import MaskedTarget, MultiTaskModule, Task, Weighting
from lightning_mtl.task.labels import number_of_samples
from lightning_mtl.weighting import MGDA, GradNorm, PCGrad, UncertaintyWeighting
from tests.training import Steps, fit, loader

SIZE, CLASSES, LEVELS = 4, 3, 5


class Trunk(nn.Module):
    """A map and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        deep = self.convolution(images).tanh()
        return {"map": deep, "vector": deep.mean((2, 3))}


class OfVector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, width)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = self.layer(features["vector"])
        return result


class OfMap(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, channels, 1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = self.layer(features["map"])
        return result


class Boxes(OfVector):
    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        found = super().forward(features)
        return {"boxes": found[:, :4].sigmoid(), "classes": found[:, 4:]}


class Embeddings(OfVector):
    """Two of each sample: of its vector, and of its vector without a part."""

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        cropped = {"vector": features["vector"] * torch.tensor([1.0, 1, 1, 0, 1, 1])}
        return super().forward(features), super().forward(cropped)


class Triplets(OfVector):
    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:  # type: ignore[override]
        anchor = super().forward(features)
        return [anchor, anchor + 0.1 * anchor.square(), anchor.roll(1, 0)]


def box_loss(prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    boxes = smooth_l1_loss(prediction["boxes"], target["boxes"])
    return boxes + cross_entropy(prediction["classes"], target["classes"])


class BoxError(Metric):
    """A metric of nested structures."""

    total: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("number", torch.tensor(0), "sum")

    def update(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        assert not prediction["boxes"].requires_grad
        self.total += (prediction["boxes"] - target["boxes"]).abs().sum()
        self.number += len(target["boxes"])

    def compute(self) -> Tensor:
        return self.total / self.number


def tasks() -> dict[str, Task]:
    nan = torch.nan
    return {
        "classes": Task(cross_entropy, MulticlassAccuracy(CLASSES, average="micro"), missing=-100),
        "regression": Task(huber_loss, MeanAbsoluteError(), missing=nan),
        # Cumulative levels, [B, LEVELS - 1]: 1 where the grade is above the level.
        "ordinal": Task(binary_cross_entropy_with_logits, MultilabelAccuracy(LEVELS - 1)),
        "detection": Task(box_loss, BoxError()),
        "segmentation": Task(
            functools.partial(cross_entropy, ignore_index=255), MulticlassJaccardIndex(CLASSES), missing=255
        ),
        "depth": Task(l1_loss, MeanAbsoluteError(), missing=nan),
        "alike": Task(lambda pair, same: cosine_embedding_loss(pair[0], pair[1], same)),
        "triplets": Task(lambda embeddings, _: triplet_margin_loss(*embeddings)),
    }


def module() -> MultiTaskModule:
    torch.manual_seed(0)
    heads: dict[str, nn.Module] = {
        "classes": OfVector(CLASSES),
        "regression": OfVector(2),
        "ordinal": OfVector(LEVELS - 1),
        "detection": Boxes(4 + CLASSES),
        "segmentation": OfMap(CLASSES),
        "depth": OfMap(1),
        "alike": Embeddings(3),
        "triplets": Triplets(3),
    }
    return MultiTaskModule(Trunk(), heads, tasks(), optimizer=functools.partial(torch.optim.Adam, lr=0.02))


def batch(size: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.rand, generator=generator)
    images = draw(size, 1, SIZE, SIZE)
    grades = torch.randint(LEVELS, (size, 1), generator=generator)
    classes = torch.randint(CLASSES, (size,), generator=generator)
    return images, {
        "classes": classes,
        "regression": draw(size, 2),
        "ordinal": (grades > torch.arange(LEVELS - 1)).float(),
        "detection": {"boxes": draw(size, 4), "classes": classes},
        "segmentation": torch.randint(CLASSES, (size, SIZE, SIZE), generator=generator),
        "depth": draw(size, 1, SIZE, SIZE),
        "alike": torch.where(draw(size) < 0.5, -1.0, 1.0),
        "triplets": torch.arange(size),
    }


def with_holes(size: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    images, targets = batch(size, seed)
    generator = torch.Generator().manual_seed(seed)

    def hidden(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator) < 0.4

    for task, value in (("classes", -100), ("regression", torch.nan), ("segmentation", 255), ("depth", torch.nan)):
        targets[task] = targets[task].masked_fill(hidden(targets[task]), value)
    rows = torch.arange(size) % 2 == 0
    for task in ("ordinal", "detection", "alike", "triplets"):
        targets[task] = MaskedTarget(targets[task], rows)
    return images, targets


WEIGHTINGS: dict[str, Callable[[], list[Weighting]]] = {
    "equal": list,
    "losses": lambda: [UncertaintyWeighting()],
    "features": lambda: [MGDA(at="features")],
    "last layer": lambda: [GradNorm()],
    "trunk": lambda: [PCGrad()],
}


@pytest.mark.parametrize("make", [batch, with_holes])
@pytest.mark.parametrize("way", WEIGHTINGS)
def test_every_kind_learns_in_one_model(way: str, make: Callable[[int, int], Any]) -> None:
    given = make(8, 1)
    steps = Steps()
    trainer = fit(module(), loader(*[given] * 12), loader(given), max_epochs=2, callbacks=[*WEIGHTINGS[way](), steps])
    first, last = steps.signals[0].losses, steps.signals[-1].losses
    assert steps.signals[0].tasks == tuple(tasks())
    assert torch.isfinite(last).all()
    assert last.sum() < 0.9 * first.sum()
    names = {f"val/loss/{task}" for task in tasks()}
    names |= {f"val/{name}/{task}" for task, declared in tasks().items() for name in declared.metric_collection()}
    assert names <= trainer.callback_metrics.keys()
    assert all(torch.isfinite(trainer.callback_metrics[name]) for name in names)


@pytest.mark.parametrize("make", [batch, with_holes])
def test_the_means_of_an_epoch_count_samples_of_every_kind(make: Callable[[int, int], Any]) -> None:
    given = [make(6, 1), make(2, 2)]
    model = module()
    trainer = fit(model, loader(given[0]), loader(*given))
    for task in set(tasks()) - {"triplets"}:  # whose negatives come from the same batch
        whole = fully(model, task, given)
        torch.testing.assert_close(trainer.callback_metrics[f"val/loss/{task}"], whole, msg=task)


def fully(model: MultiTaskModule, task: str, given: list[Any]) -> Tensor:
    """A task's mean loss, one labeled element, or whole sample, at a time."""
    losses: list[Tensor] = []
    for images, targets in given:
        target = targets[task]
        for row in range(len(images)):
            own: Any = {"detection": lambda t, r=row: {k: v[r : r + 1] for k, v in t.items()}}.get(
                task, lambda t, r=row: t[r : r + 1]
            )
            if isinstance(target, MaskedTarget):
                if not target.labeled[row]:
                    continue
                losses.append(loss_of(model, task, images[row : row + 1], own(target.target)))
                continue
            piece = own(target)
            if task in ("segmentation", "depth", "regression", "classes"):
                marked = piece.isnan() if piece.is_floating_point() else (piece == 255) | (piece == -100)
                blank = torch.nan if piece.is_floating_point() else {"classes": -100, "segmentation": 255}[task]
                for place in (~marked).nonzero():
                    single = torch.full_like(piece, blank)
                    single[tuple(place)] = piece[tuple(place)]
                    losses.append(loss_of(model, task, images[row : row + 1], single))
            else:
                losses.append(loss_of(model, task, images[row : row + 1], piece))
    return torch.stack(losses).mean()


def loss_of(model: MultiTaskModule, task: str, images: Tensor, target: Any) -> Tensor:
    with torch.no_grad():
        return model.present_outputs((images, {task: target}))[task].loss


def test_images_with_any_number_of_boxes_come_as_a_list() -> None:
    class PerImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, features: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": box[None]} for box in self.layer(features["vector"])]

    def nearest(predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
        pairs = zip(predictions, targets, strict=True)
        return torch.stack([torch.cdist(p["boxes"], t["boxes"]).min(1).values.mean() for p, t in pairs]).mean()

    targets = [{"boxes": torch.rand(number, 4)} for number in (1, 4, 2)]
    model = MultiTaskModule(Trunk(), {"boxes": PerImage()}, {"boxes": Task(nearest)})
    images = torch.rand(3, 1, SIZE, SIZE)
    trainer = fit(
        model,
        loader((images, {"boxes": targets})),
        loader((images, {"boxes": targets}), (images[:1], {"boxes": targets[:1]})),
    )
    losses = [loss_of(model, "boxes", images, targets), loss_of(model, "boxes", images[:1], targets[:1])]
    torch.testing.assert_close(trainer.callback_metrics["val/loss/boxes"], (3 * losses[0] + losses[1]) / 4)
    assert number_of_samples(torch.tensor(1.0)) == number_of_samples("text") == 1
