"""Each task with inputs of its own: the trunk once a task, or once on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanSquaredError

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.task.concatenation import concatenate
from lightning_mtl.weighting import CRMOGM, MGDA, GradNorm, UncertaintyWeighting
from tests.small import regressions, small
from tests.training import Steps, fit, loader
from tests.weightings import fixed

TASKS = ("a", "b", "c")
WEIGHTS = {"a": 0.5, "b": 2.0, "c": 1.5}
WAYS: dict[str, Callable[[], list[Weighting]]] = {
    "no weighting": list,
    "losses": lambda: [UncertaintyWeighting()],
    "features, weights alone": lambda: [fixed(WEIGHTS, "losses", weighs_heads=False)],
    "last layer": lambda: [GradNorm()],
    "named layer": lambda: [fixed(WEIGHTS, "gramian", at="trunk.0")],
    "trunk": lambda: [MGDA()],
}


def own_inputs(*tasks: str, seed: int = 0) -> dict[str, tuple[Tensor, Tensor] | None]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 2, "b": 4, "c": 3}
    return {
        task: (
            torch.randn(sizes[task], 3, generator=generator, dtype=torch.float64),
            torch.randn(sizes[task], 1, generator=generator, dtype=torch.float64),
        )
        if task in tasks
        else None
        for task in TASKS
    }


def module(**arguments: Any) -> MultiTaskModule:
    return small(TASKS, **arguments).double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_pass_equals_one_a_task(way: str, accumulate: int) -> None:
    given = [own_inputs(*TASKS), own_inputs("a", "c", seed=1), own_inputs("b", seed=2), own_inputs(*TASKS, seed=3)]
    separate, together = Steps(), Steps()
    for concatenates, steps in ((False, separate), (True, together)):
        model = module(concatenate_inputs=concatenates, accumulate_grad_batches=accumulate)
        fit(model, loader(*given), callbacks=[*WAYS[way](), steps])
    assert len(separate.gradients) == 4 / accumulate
    for ours, theirs in zip(together.signals, separate.signals, strict=True):
        assert ours.tasks == theirs.tasks
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=1e-6)
    for found, expected in zip(together.gradients, separate.gradients, strict=True):
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None
            else:
                torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)


class Counting(nn.Module):
    """Takes a dict and returns a list of tensors in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor, scale: float, more: tuple[Tensor, Tensor]) -> dict[str, list[Tensor]]:
        self.calls += 1
        return {"features": [scale * self.layer(x), more[0] + more[1]]}


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, features: Mapping[str, list[Tensor]]) -> Tensor:
        deep, shallow = features["features"]
        result: Tensor = self.layer(deep) + shallow
        return result


def nested(size: int, scale: float = 2.0) -> dict[str, Any]:
    x = torch.randn(size, 3, dtype=torch.float64)
    return {"x": x, "scale": scale, "more": (x[:, :1], x[:, 1:2])}


def test_nested_inputs_and_features_and_evaluation() -> None:
    torch.manual_seed(1)
    metrics = Task(mse_loss, MeanSquaredError())
    batch = {task: (nested(size), torch.randn(size, 1, dtype=torch.float64)) for size, task in enumerate(TASKS, 1)}
    models = []
    for concatenates in (False, True):
        torch.manual_seed(3)
        heads = {task: Reading() for task in TASKS}
        models.append(
            MultiTaskModule(Counting(), heads, dict.fromkeys(TASKS, metrics), concatenate_inputs=concatenates)
        )
    separate, together = models
    expected, found = separate.present_outputs(batch), together.present_outputs(batch)
    assert [model.trunk.calls for model in models] == [3, 1]
    for task in TASKS:
        torch.testing.assert_close(found[task].loss, expected[task].loss)
        torch.testing.assert_close(
            together.predict_step(batch, 0)[task], separate.predict_step(batch, 0)[task], rtol=1e-12, atol=1e-12
        )


def test_an_overridden_forward_and_a_trunk_with_an_entry_a_task() -> None:
    class Negative(MultiTaskModule):
        def forward(self, inputs: Any) -> dict[str, Tensor]:
            return {task: -prediction for task, prediction in super().forward(inputs).items()}

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {task: x + index for index, task in enumerate(TASKS)}

    batch = own_inputs(*TASKS)
    for cls, trunk in ((Negative, nn.Identity()), (MultiTaskModule, Branches())):
        losses = []
        for concatenates in (False, True):
            torch.manual_seed(3)
            heads = {task: nn.Linear(3, 1, dtype=torch.float64) for task in TASKS}
            model = cls(trunk, heads, regressions(TASKS), concatenate_inputs=concatenates)
            losses.append({task: output.loss.item() for task, output in model.present_outputs(batch).items()})
        assert losses[1] == pytest.approx(losses[0])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (torch.zeros(2, 5), r"'a' has a tensor of torch.float32 and shape \[4, 3\], 'b' has .* \[2, 5\]"),
        (torch.zeros(2, 3).double(), "torch.float64"),
        ({"x": torch.zeros(2, 3)}, r"a mapping with the keys \['x'\]"),
        ((torch.zeros(2, 3),), "a tuple of 1"),
    ],
)
def test_inputs_that_do_not_fit_together_are_named(other: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        concatenate({"a": torch.zeros(4, 3), "b": other})
    with pytest.raises(ValueError, match=r"'a' has 1\.0, 'b' has 2\.0"):
        concatenate({"a": (torch.zeros(4, 3), 1.0), "b": (torch.zeros(4, 3), 2.0)})
    with pytest.raises(ValueError, match=r"one row a sample; task 'a' has a tensor of shape \[\]"):
        concatenate({"a": (torch.zeros(4, 3), torch.tensor(1.0)), "b": (torch.zeros(4, 3), torch.tensor(1.0))})


def test_features_with_another_number_of_rows_are_refused() -> None:
    class Pooling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    model = MultiTaskModule(Pooling(), {t: nn.Linear(3, 1) for t in TASKS}, regressions(TASKS), concatenate_inputs=True)
    with pytest.raises(ValueError, match=r"9 samples came back as a tensor of shape \[3\]"):
        model.double().present_outputs(own_inputs(*TASKS))


@pytest.mark.parametrize("concatenates", [False, True])
@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize("make", [MGDA, GradNorm, lambda at, **more: CRMOGM(MGDA(at=at), **more)])
def test_features_of_different_inputs_are_refused_at_the_first_batch(
    make: Callable[..., Weighting], start_step: int, concatenates: bool
) -> None:
    seen = Steps()
    model = module(concatenate_inputs=concatenates)
    with pytest.raises(ValueError, match=r"at='features'.*no common space.*at='last_layer'"):
        fit(model, loader(own_inputs(*TASKS)), callbacks=[make(at="features", start_step=start_step), seen])
    assert not seen.signals


def test_a_validation_with_inputs_of_their_own_is_not_refused() -> None:
    inputs = torch.randn(2, 3, dtype=torch.float64)
    joint = (inputs, dict.fromkeys(TASKS, inputs[:, :1]))
    trainer = fit(module(), loader(joint), loader(own_inputs(*TASKS)), callbacks=[MGDA(at="features")])
    assert "val/loss/c" in trainer.callback_metrics
