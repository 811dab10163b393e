"""What the factors make of measurements, metrics, targets and predictions, against independent computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from lightning_mtl.distributed import Ranks
from lightning_mtl.learning_rates import GradientNorm, Importance, Relatedness, TaskLearningRate
from lightning_mtl.learning_rates.importance import lag_factors
from lightning_mtl.learning_rates.relatedness import aligned, of_all_ranks
from lightning_mtl.weighting import MGDA
from tests.small import batch, binary, small, trunk
from tests.training import Steps, fit, loader
from tests.weightings import fixed

BATCHES = [batch(8, seed, ("a", "b", "c")) for seed in range(5)]
TASKS = ("a", "b", "c")
ONES = dict.fromkeys(TASKS, 1.0)


def three(**arguments: Any) -> MultiTaskModule:
    return small(TASKS, **arguments)


def running(values: list[Tensor], decay: float) -> Tensor:
    mean = values[0]
    for value in values[1:]:
        mean = decay * mean + (1 - decay) * value
    return mean


# Gradient norms


def test_shared_norms_are_those_that_the_weighting_measures() -> None:
    factor, steps = GradientNorm(of="shared", power=0.5, decay=0.7), Steps()
    fit(three(), loader(*BATCHES), callbacks=[TaskLearningRate(factor), fixed(ONES, "norms", every_n_steps=2), steps])
    norms = [signals.norms for signals in steps.signals if signals.norms is not None]
    assert len(norms) == 3
    mean = running(norms, 0.7)
    torch.testing.assert_close(factor.values(), (mean.mean() / mean).sqrt())


def test_a_head_without_gradient_of_its_own_scale_counts_as_a_thousandth() -> None:
    factor = GradientNorm(decay=0.0)
    factor.reset(["a", "b", "c"])
    assert factor.values().tolist() == [1.0, 1.0, 1.0]
    factor.update_heads(torch.tensor([0.0, 3.0, torch.nan]))
    assert factor.values().tolist() == pytest.approx([1000.0, 0.5, 1.0])
    factor.update_heads(torch.zeros(3))
    assert factor.values().tolist() == [1.0, 1.0, 1.0]


def test_power_zero_and_the_product_with_bounds() -> None:
    for power, expected in ((0.0, [1.0, 1.0]), (2.0, [4.0, 4 / 9])):
        factor = GradientNorm(power, decay=0.0)
        rates = TaskLearningRate([Importance({"a": 3.0}), factor], bounds=(0.5, 3.5))
        rates.reset(["a", "b"])
        factor.update_heads(torch.tensor([1.0, 3.0]))
        clamped = [min(max(value, 0.5), 3.5) for value in (3 * expected[0], expected[1])]
        assert rates.current(0).tolist() == pytest.approx(clamped)


def test_normalized_multipliers_have_the_mean_one() -> None:
    rates = TaskLearningRate(Importance({"a": 3.0}), normalize=True)
    rates.reset(["a", "b"])
    assert rates.current(0).tolist() == [1.5, 0.5]


def test_bounds_come_after_the_mean_and_no_learning_at_all_has_none() -> None:
    for weights, expected in (({"a": 8.0}, [1.2, 0.5]), ({"a": 0.0, "b": 0.0}, [0.0, 0.0])):
        bounds = (0.5, 1.2) if any(weights.values()) else None
        rates = TaskLearningRate(Importance(weights), normalize=True, bounds=bounds)
        rates.reset(["a", "b"])
        assert rates.current(0).tolist() == expected


# Importance


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_lagging_tasks_get_more(power: float) -> None:
    factor = Importance(metric="accuracy", power=power, largest=1.2)
    module = binary()
    data = loader(*[batch(8, seed) for seed in range(3)])
    trainer = fit(module, data, data, callbacks=[TaskLearningRate(factor)], max_epochs=2)
    lags = [1 - float(trainer.callback_metrics[f"val/accuracy/{task}"]) for task in ("a", "b")]
    assert lags[0] != lags[1]
    mean = sum(lags) / 2
    expected = [min(max((lag / mean) ** power, 1 / 1.2), 1.2) for lag in lags]
    assert factor.values().tolist() == pytest.approx(expected)


def test_baselines_compare_metrics_of_either_direction() -> None:
    metrics = MetricCollection({"accuracy": BinaryAccuracy()})
    tasks = {"a": Task(mse_loss, metrics, {"accuracy": 0.8}), "b": Task(mse_loss, baseline={"loss": 0.1})}
    heads = {task: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for task in tasks}
    factor = Importance(metric={"a": "accuracy", "b": "loss"})
    data = loader(batch(8))
    trainer = fit(MultiTaskModule(trunk(), heads, tasks), data, data, callbacks=[TaskLearningRate(factor)])
    found = trainer.callback_metrics
    lags = torch.stack([0.8 / found["val/accuracy/a"], found["val/loss/b"] / 0.1])
    torch.testing.assert_close(factor.lags, lags)
    torch.testing.assert_close(factor.values(), lag_factors(lags, 1.0, 4.0))


def test_scores_at_and_below_zero_lag_a_thousand_times() -> None:
    tasks = {"a": Task(mse_loss, MetricCollection({"accuracy": BinaryAccuracy()}), {"accuracy": 0.5})}
    factor = Importance(metric="accuracy")
    assert [factor._lag("a", tasks["a"], {"accuracy": value}) for value in (0.5, 0.25, 0.0, -1.0)] == pytest.approx(
        [1.0, 2.0, 1000.0, 1000.0]
    )
    assert math.isnan(factor._lag("a", tasks["a"], {}))


# Relatedness


def test_cosines_are_running_means_of_the_measured_steps() -> None:
    factor, steps = Relatedness("gradient_cosine", power=2.0, decay=0.8), Steps()
    weighting = fixed(ONES, "gramian", every_n_steps=2)
    fit(three(), loader(*BATCHES), callbacks=[TaskLearningRate(factor), weighting, steps])
    cosines = []
    for signals in steps.signals:
        if signals.gramian is not None:
            scale = signals.gramian.diagonal().rsqrt()
            cosines.append(scale[:, None] * signals.gramian * scale)
    assert len(cosines) == 3
    mean = running(cosines, 0.8).fill_diagonal_(0.0).sum(1) / 2
    torch.testing.assert_close(factor.values().double(), (1 + mean) ** 2, rtol=1e-5, atol=1e-6)


def test_related_tasks_get_more_than_opposed_ones() -> None:
    inputs, targets = BATCHES[0]
    same = (inputs, {"a": targets["a"], "b": targets["a"], "c": 1 - targets["a"]})
    module = three()
    for task in TASKS[1:]:
        module.heads[task].load_state_dict(module.heads["a"].state_dict())
    for parameter in [p for task in TASKS for p in module.heads[task].parameters()]:
        nn.init.constant_(parameter, 0.1)
    factor = Relatedness("gradient_cosine")
    fit(module, loader(*[same] * 3), callbacks=[TaskLearningRate(factor), MGDA()])
    values = factor.values().tolist()
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] > values[2]


def partly_labeled(number: int) -> tuple[list[Any], dict[str, Tensor]]:
    """Batches with a missing label, a missing task; and all targets in a row."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(number, 6, 3, generator=generator)
    a = x[..., :1] + 0.3 * torch.randn(number, 6, 1, generator=generator)
    targets = {"a": a, "b": -a + torch.randn(number, 6, 1, generator=generator), "c": torch.randn(a.shape)}
    targets["b"][2] = torch.nan
    drawn = [(x[i], {k: y[i] for k, y in targets.items() if i != 2 or k != "b"}) for i in range(number)]
    return drawn, {k: y.reshape(-1) for k, y in targets.items()}


@pytest.mark.parametrize("samples", [12, 24, 1000])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_correlation_of_targets(samples: int, accumulate: int) -> None:
    drawn, targets = partly_labeled(5)
    factor = Relatedness("target_correlation", samples=samples)
    module = three(accumulate_grad_batches=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    fit(module, loader(*drawn), callbacks=[TaskLearningRate(factor)])
    first = np.array([targets[task][:samples].numpy() for task in TASKS], dtype=np.float64)
    expected = []
    for i in range(3):
        pairs = [(j, ~np.isnan(first[i]) & ~np.isnan(first[j])) for j in range(3) if j != i]
        expected.append(1 + np.mean([abs(np.corrcoef(first[i, both], first[j, both])[0, 1]) for j, both in pairs]))
    assert factor.values().tolist() == pytest.approx(expected, rel=1e-5)
    assert bool(factor.collects) == (samples == 1000)


class Classes(nn.Module):
    """A head whose predicted classes are its input's."""

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.one_hot(z[:, 0].long() % 3, 3) * 1.0 + z[:, 1:2] * 0


@pytest.mark.parametrize("what", ["target", "prediction"])
def test_mutual_information(what: str) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (40, 3), generator=generator)
    labels[:, 1] = torch.where(torch.rand(40, generator=generator) < 0.8, labels[:, 0], labels[:, 1])
    factor = Relatedness(
        "target_mutual_information" if what == "target" else "prediction_mutual_information", samples=30
    )

    class Given(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            outputs = {}
            for k, task in enumerate(TASKS):
                logits = self.heads[task](self.trunk(batch.float()))
                scores = nn.functional.one_hot(batch[:, k], 3).float()
                target = batch[:, k] if what == "target" else batch[:, 0]
                outputs[task] = TaskOutput(cross_entropy(logits, target), scores, target)
            return outputs

    heads = {task: nn.Linear(4, 3) for task in TASKS}
    module = Given(trunk(), heads, {task: Task(cross_entropy) for task in TASKS})
    fit(module, loader(*labels.split(8)), callbacks=[TaskLearningRate(factor)])
    kept = (labels[:30] if what == "target" else labels[10:]).numpy()
    expected = [
        1 + np.mean([normalized_mutual_info_score(kept[:, i], kept[:, j]) for j in range(3) if j != i])
        for i in range(3)
    ]
    assert factor.values().tolist() == pytest.approx(expected, rel=1e-4)
    assert expected[0] > 1.1 > expected[2]


def test_dense_targets_are_taken_evenly_spread() -> None:
    maps = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    outputs = {"b": TaskOutput(torch.zeros(()), maps.unsqueeze(1), maps), "a": TaskOutput(torch.zeros(()), None, maps)}
    found = aligned(outputs, TASKS, "targets", 6, torch.device("cpu"))
    assert found[:2].tolist() == [[0.0, 4.0, 8.0, 12.0, 16.0, 20.0]] * 2
    assert found[2].isnan().all()
    assert of_all_ranks([found, found[:, :0], found[:, :2]], Ranks.alone()).shape == (3, 8)
    del outputs["a"]
    probable = {"b": TaskOutput(torch.zeros(()), torch.tensor([[0.2], [0.7]]), None)}
    logits = {"b": TaskOutput(torch.zeros(()), torch.tensor([0.2, -0.7]), None)}
    for output, expected in ((probable, [0.0, 1.0]), (logits, [1.0, 0.0]), (outputs, [1.0])):
        classes = aligned(output, ("b",), "predictions", 24, torch.device("cpu"))[0]
        assert classes[-len(expected) :].tolist() == expected


@pytest.mark.parametrize(
    ("measure", "targets", "message"),
    [
        ("target_correlation", (4, 3), r"hold \{'a': 4, 'b': 3\} of them"),
        ("target_mutual_information", (4, 4), "targets of task 'a' are no whole numbers"),
    ],
)
def test_targets_that_do_not_fit(measure: Any, targets: tuple[int, int], message: str) -> None:
    class Uneven(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            outputs: Any = super().task_losses(batch)
            for output, length in zip(outputs.values(), targets, strict=True):
                output.target = torch.linspace(0, 1, length)
            return outputs

    with pytest.raises(ValueError, match=message):
        fit(small(cls=Uneven), loader(batch(4)), callbacks=[TaskLearningRate(Relatedness(measure))])


def test_batches_of_each_tasks_own_samples() -> None:
    inputs, targets = batch(4)
    own = {task: (inputs, target) for task, target in targets.items()}
    with pytest.raises(ValueError, match="measure Relatedness\\('gradient_cosine'\\)"):
        fit(small(), loader(own), callbacks=[TaskLearningRate(Relatedness("target_correlation"))])


def test_losses_without_targets() -> None:
    class Bare(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            return {task: output.loss for task, output in super().task_losses(batch).items()}  # type: ignore[union-attr]

    with pytest.raises(ValueError, match="task 'a' came without; return TaskOutput"):
        fit(small(cls=Bare), loader(batch(4)), callbacks=[TaskLearningRate(Relatedness("target_correlation"))])
