"""Standardized targets and scaled losses: as if the data, or the losses, had been other ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, StackDataset, TensorDataset
from torchmetrics import MeanAbsoluteError, MetricCollection

from lightning_mtl import MaskedTarget, MultiTaskModule, Task, Weighting
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.finetuning import add_task, drop_task, export
from lightning_mtl.training.targets import one_pass
from lightning_mtl.weighting import FAMO, MGDA, GradNorm, UncertaintyWeighting
from tests.small import heads, trunk
from tests.thinning import thinned
from tests.training import fit, flat_parameters, loader, quiet_trainer

MEAN, STD = 300.0, 35.0
N = 20
pytestmark = [
    pytest.mark.filterwarnings("ignore:In the first step the loss of task"),
    # Of resuming without the callback that saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def data(*, missing: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, an easy target, and one in units of its own; float64, so that nothing but the rule makes a difference."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    b = MEAN + STD * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    if missing:
        b[::3] = torch.nan
    return x, a, b


def statistics(b: Tensor) -> tuple[float, float]:
    labels = b[b.isnan().logical_not()]
    return float(labels.mean()), float(labels.std(unbiased=False))


def model(task: Task, loss: Any = mse_loss, cls: type[MultiTaskModule] = MultiTaskModule, **arguments: Any) -> Any:
    torch.manual_seed(2)
    settings = {"optimizer": functools.partial(torch.optim.SGD, lr=0.05)} | arguments
    return cls(trunk(), heads(), {"a": Task(loss), "b": task}, **settings).double()


def joint(x: Any, a: Any, b: Any) -> DataLoader[Any]:
    return DataLoader(StackDataset(x, StackDataset(a=a, b=b)), batch_size=5)


WEIGHTINGS: dict[str, Callable[[], Weighting | None]] = {
    "none": lambda: None,
    "losses": lambda: UncertaintyWeighting(lr=0.1),
    "trunk": MGDA,
    "features": lambda: MGDA(at="features"),
    "last layer": lambda: GradNorm(lr=0.1),
    "losses after": FAMO,
}


def callbacks(name: str) -> list[Any]:
    made = WEIGHTINGS[name]()
    return [] if made is None else [made]


# Standardized targets


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("missing", thinned([True, False]))
def test_standardizing_is_training_on_standardized_targets(name: str, missing: bool) -> None:
    x, a, b = data(missing=missing)
    mean, std = statistics(b)
    marker = torch.nan if missing else None
    metrics = MetricCollection({"error": MeanAbsoluteError()})
    asked = model(Task(mse_loss, metrics, standardize=True, missing=marker))
    given = model(Task(mse_loss, metrics, standardize=(mean, std), missing=marker))
    by_hand = model(Task(mse_loss, metrics, missing=marker))
    trained = [
        fit(module, joint(x, a, target), joint(x, a, target), callbacks=callbacks(name), max_epochs=2)
        for module, target in ((asked, b), (given, b), (by_hand, (b - mean) / std))
    ]
    torch.testing.assert_close(flat_parameters(asked), flat_parameters(given), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(flat_parameters(asked), flat_parameters(by_hand), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(asked(x)["b"], by_hand(x)["b"] * std + mean)
    logged, by_hand_logged = (trainer.callback_metrics for trainer in (trained[0], trained[2]))
    torch.testing.assert_close(logged["val/loss/b"], by_hand_logged["val/loss/b"])
    torch.testing.assert_close(logged["val/error/b"], by_hand_logged["val/error/b"] * std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_pass_over_the_targets_changes_no_order(sanity: int) -> None:
    x, a, b = data()
    found = []
    for standardize in (True, statistics(b)):
        module = model(Task(mse_loss, standardize=standardize))
        torch.manual_seed(7)
        shuffled = DataLoader(joint(x, a, b).dataset, batch_size=5, shuffle=True)
        fit(module, shuffled, joint(x, a, b), max_epochs=2, num_sanity_val_steps=sanity)
        found.append((flat_parameters(module), torch.get_rng_state()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-13)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "kind", ["a loader each", "data module", "masked", "automatic", "accumulated", "a sample each"]
)
def test_every_form_of_data_has_the_same_statistics(kind: str) -> None:
    x, a, b = data()
    module = model(Task(mse_loss, standardize=True))
    trainer = quiet_trainer()
    given: dict[str, Any] = {}
    if kind == "a loader each":
        given["train_dataloaders"] = {t: DataLoader(TensorDataset(x, y), batch_size=5) for t, y in (("a", a), ("b", b))}
    elif kind == "data module":
        given["datamodule"] = MultiTaskDataModule({"a": TensorDataset(x, a), "b": TensorDataset(x, b)}, batch_size=3)
    elif kind == "masked":
        labeled = torch.arange(N) % 2 == 0
        given["train_dataloaders"] = loader(
            (x, {"a": a, "b": MaskedTarget(b.masked_fill(~labeled[:, None], 1e9), labeled)})
        )
        b = b[labeled]
    elif kind == "a sample each":
        given["train_dataloaders"] = loader(*((x[i : i + 1], {"a": a[i : i + 1], "b": b[i : i + 1]}) for i in range(N)))
    else:
        module.automatic_optimization = kind == "automatic"
        module.accumulate_grad_batches = 1 if kind == "automatic" else 2
        given["train_dataloaders"] = joint(x, a, b)
    trainer.fit(module, **given)
    units = module.target_units["b"]
    assert (float(units.mean), float(units.std)) == pytest.approx(statistics(b), rel=1e-12)


def test_a_subset_sampler_is_heeded() -> None:
    x, a, b = data()
    chosen = DataLoader(joint(x, a, b).dataset, batch_size=4, sampler=torch.utils.data.SubsetRandomSampler(range(7)))
    module = model(Task(mse_loss, standardize=True))
    fit(module, chosen)
    assert float(module.target_units["b"].mean) == pytest.approx(float(b[:7].mean()), rel=1e-12)


def test_what_a_distributed_sampler_repeats_counts_once() -> None:
    data = TensorDataset(torch.arange(7.0))
    seen = []
    for rank in range(3):
        sampler: Any = DistributedSampler(data, num_replicas=3, rank=rank, seed=4)
        seen += [
            x for [batch] in one_pass(DataLoader(data, batch_size=2, sampler=sampler), ["b"]) for x in batch.tolist()
        ]
    assert sorted(seen) == list(range(7))


def test_running_statistics_keep_the_predictions_and_resume(tmp_path: Path) -> None:
    x, a, b = data()
    batches = [(x[i : i + 5], {"a": a[i : i + 5], "b": b[i : i + 5]}) for i in range(0, N, 5)]

    class Following(MultiTaskModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            units = self.target_units.of("b")
            seen.append(float("nan") if units is None else units.mean.item())

    seen: list[float] = []
    whole = model(Task(mse_loss, standardize="running"), cls=Following)
    fit(whole, loader(*batches), max_epochs=2)
    means = [float(b[i : i + 5].mean()) for i in range(0, N, 5)] * 2
    expected = [means[0]]
    for mean in means[1:]:
        expected.append(0.99 * expected[-1] + 0.01 * mean)
    assert seen == pytest.approx(expected, rel=1e-12)
    units = whole.target_units["b"]
    before = whole(x)["b"]
    units.follow(torch.tensor([2.0, 900.0, 900.0**2]).double(), whole.heads["b"])
    assert float(units.mean) > seen[-1] + 1
    torch.testing.assert_close(whole(x)["b"], before)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    again, resumed = (model(Task(mse_loss, standardize="running")) for _ in range(2))
    fit(again, loader(*batches), max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    fit(resumed, loader(*batches), max_epochs=2, ckpt_path=next(tmp_path.glob("epoch=0*")))
    assert torch.equal(flat_parameters(again), flat_parameters(resumed))
    assert torch.equal(again.target_units["b"].mean, resumed.target_units["b"].mean)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_exports_and_added_tasks_are_in_raw_units(tmp_path: Path) -> None:
    x, _, b = data()
    mean, std = statistics(b)
    module = model(Task(mse_loss, standardize=(mean, std)))
    expected = module(x)["b"]
    assert float(expected.detach().mean()) == pytest.approx(MEAN, rel=0.2)
    path = export(module, x, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(path).module()(x)["b"], expected)
    head, task = drop_task(module, "b")
    torch.testing.assert_close(head(module.trunk(x)) * std + mean, expected)
    add_task(module, "b", head, task)
    torch.testing.assert_close(module(x)["b"], expected)


def test_half_precision_keeps_a_mean_far_from_0() -> None:
    units = model(Task(mse_loss, standardize=(1e4, 1.0))).target_units["b"]
    z = torch.tensor([[-1.0], [0.5]], dtype=torch.bfloat16)
    assert torch.equal(units.standard(units.raw(z)), z.float())


def test_a_mean_for_each_column() -> None:
    x, a, _ = data()
    b = torch.cat([a, 5 + 100 * a], dim=1)
    b[0, 0] = b[3, 1] = torch.nan
    torch.manual_seed(2)
    module = MultiTaskModule(
        trunk(), {"b": nn.Linear(4, 2)}, {"b": Task(mse_loss, missing=torch.nan, standardize=((0, 5), (1, 100)))}
    ).double()
    prediction = module(x)["b"]
    z = (prediction - torch.tensor([0.0, 5.0])) / torch.tensor([1.0, 100.0])
    target = torch.cat([b[:, :1], (b[:, 1:] - 5) / 100], dim=1)
    there = target.isnan().logical_not()
    torch.testing.assert_close(module.task_output("b", prediction, b).loss, mse_loss(z[there], target[there]))


class ItsOwnLoss(MultiTaskModule):
    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        x, targets = batch
        return {task: mse_loss(prediction, targets[task]) for task, prediction in self(x).items()}


class Once(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, a, b = data()
        return iter([(x[i], {"a": a[i], "b": b[i]}) for i in range(N)])


@pytest.mark.parametrize(
    ("standardize", "train", "cls", "expected"),
    [
        (True, lambda: joint(*data()[:2], torch.ones(N, 1).double()), MultiTaskModule, r"'b'.*deviation 0\.0"),
        (True, lambda: joint(*data()[:2], torch.arange(N)[:, None]), MultiTaskModule, r"'b'.*real numbers.*int64"),
        (True, lambda: joint(*data()[:2], data()[2][:, 0]), MultiTaskModule, r"'b'.*shape, found \[5, 1\] for \[5\]"),
        (True, lambda: DataLoader(Once(), batch_size=5), MultiTaskModule, "'b'.*Once can be read but once.*'running'"),
        (True, lambda: joint(*data()), ItsOwnLoss, r"'b'.*task_losses may make other targets.*\(mean, std\)"),
        ((0.0, 1.0), lambda: joint(*data()), ItsOwnLoss, "'b' has no effect.*return self.task_output"),
    ],
    ids=["constant", "classes", "shapes", "iterable", "own form", "own loss"],
)
def test_what_cannot_be_standardized(standardize: Any, train: Any, cls: Any, expected: str) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        fit(model(Task(mse_loss, standardize=standardize), cls=cls), train())


def test_mistakes_are_refused_at_construction() -> None:
    for wrong in ("yes", (1.0,), (0.0, 0.0), (0.0, float("nan")), (0.0, "x"), 3):
        with pytest.raises(ValueError, match=r"standardize=.*must be True, 'running', or"):
            Task(mse_loss, standardize=wrong)  # type: ignore[arg-type]
    for scale in (0.0, -1, float("inf"), True, "first"):
        with pytest.raises(ValueError, match=r"loss_scale=.*must be a positive number"):
            Task(mse_loss, loss_scale=scale)  # type: ignore[arg-type]
    head = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"'b'.*head is that of \['a'\], too"):
        MultiTaskModule(trunk(), {"a": head, "b": head}, {"a": Task(mse_loss), "b": Task(mse_loss, standardize=True)})
    tasks = {"a": Task(mse_loss), "b": Task(mse_loss, standardize="running")}
    with pytest.raises(ValueError, match=r"'b'.*last layer.*Sequential, does not end with one"):
        MultiTaskModule(trunk(), {"a": head, "b": nn.Sequential(nn.Linear(4, 1), nn.Softplus())}, tasks)
    with pytest.raises(RuntimeError, match=r"'b'.*fit first"):
        model(Task(mse_loss, standardize=True))(data()[0])
