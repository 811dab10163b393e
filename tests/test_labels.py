"""What is labeled is selected, and nothing else reaches loss, metrics and gradients."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MaskedTarget, MultiTaskModule, Task, TaskOutput
from lightning_mtl.task.labels import labeled_part
from tests.small import batch, heads, trunk
from tests.training import Steps, fit, loader, quiet_trainer
from tests.weightings import fixed

NAN = torch.nan


# Selecting


@pytest.mark.parametrize("missing", [-1.0, NAN, -100])
def test_elements_of_several_columns(missing: float) -> None:
    prediction, target = torch.randn(5, 3), torch.randn(5, 3)
    hidden = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    part = labeled_part(prediction, target.masked_fill(hidden, missing), missing)
    assert (part.num_samples, part.num_missing) == (10, 5)
    expected = (prediction - target).square()[~hidden].mean()
    torch.testing.assert_close(mse_loss(part.prediction, part.target), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_samples_keep_their_shape(shape: tuple[int, ...]) -> None:
    prediction, target = torch.randn(shape), torch.randn(shape)
    target[1] = NAN
    part = labeled_part(prediction, target, NAN)
    assert part.prediction.equal(prediction[[0, 2, 3]])
    assert part.target.equal(target[[0, 2, 3]])


def test_whole_samples_of_several_numbers() -> None:
    boxes = torch.rand(4, 4)
    boxes[0, 2], boxes[3] = NAN, NAN
    part = labeled_part(torch.rand(4, 4), boxes, NAN, "sample")
    assert part.target.equal(boxes[1:3])
    assert (part.num_samples, part.num_missing) == (2, 2)


@pytest.mark.parametrize("size", [(2, 3), (6, 6)])  # as many rows and columns as classes
@pytest.mark.parametrize("ignored", [-100, 255])
def test_dense_classes_are_what_the_losss_own_ignore_index_makes_of_them(size: tuple[int, int], ignored: int) -> None:
    logits, classes = torch.randn(4, 6, *size), torch.randint(6, (4, *size))
    classes[torch.rand(4, *size) < 0.4] = ignored
    part = labeled_part(logits, classes, ignored, class_dim=1)
    expected = cross_entropy(logits, classes, ignore_index=ignored)
    torch.testing.assert_close(cross_entropy(part.prediction, part.target), expected)
    torch.testing.assert_close(cross_entropy(part.prediction, part.target, ignore_index=ignored), expected)
    assert part.num_samples == int((classes != ignored).sum())
    assert part.prediction.shape == (part.num_samples, 6)


def test_classes_last_and_dense_regression() -> None:
    target = torch.tensor([[0, -100, 1], [1, 1, -100]])
    part = labeled_part(torch.randn(2, 3, 5), target, -100)  # 5 classes of 3 tokens, classes last
    assert part.prediction.shape == (4, 5)
    depth = torch.rand(2, 1, 3, 3)
    depth[0, 0, 1] = NAN
    part = labeled_part(torch.rand(2, 1, 3, 3), depth, NAN)
    assert part.target.shape == part.prediction.shape == (15,)


@pytest.mark.parametrize("length", [1, 4, 5, 6])
def test_tokens_are_selected_where_as_many_as_classes(length: int) -> None:
    logits, tags = torch.randn(3, length, 5), torch.randint(5, (3, length))
    tags[0, length // 2 :] = -100
    expected = cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-100)
    for prediction, class_dim in ((logits, -1), (logits, 2), (logits.movedim(2, 1), 1)):
        part = labeled_part(prediction, tags, -100, class_dim=class_dim)
        torch.testing.assert_close(cross_entropy(part.prediction, part.target), expected)


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 3, 3, 3)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_shape_with_two_readings_is_refused(shape: tuple[int, ...], nested: bool) -> None:
    prediction = torch.randn(shape)
    with pytest.raises(ValueError, match=r"two ways.*Task\(class_dim=1\).*Task\(class_dim=-1\)"):
        labeled_part([prediction] if nested else prediction, torch.zeros(shape[:-1], dtype=torch.long), -100)


def test_masks_of_samples_and_of_boxes_leave_no_second_reading() -> None:
    boxes = MaskedTarget(torch.rand(2, 4, 4), torch.tensor([[True, False, True, True]] * 2))  # 4 boxes an image
    assert labeled_part(torch.rand(2, 4, 4), boxes).prediction.shape == (6, 4)
    samples = MaskedTarget(torch.zeros(3, 5), torch.tensor([[True], [False], [True]]))
    assert labeled_part(torch.rand(3, 5, 1), samples).prediction.shape == (2, 5, 1)
    assert labeled_part(torch.rand(3, 5, 5), samples, class_dim=-1).prediction.shape == (2, 5, 5)


def test_a_mask_of_samples_selects_from_nested_structures() -> None:
    target = {"boxes": torch.rand(3, 4), "classes": torch.arange(3)}
    prediction = (torch.rand(3, 4), [torch.rand(3, 7)])
    part = labeled_part(prediction, MaskedTarget(target, torch.tensor([True, False, True])))
    assert part.target["classes"].tolist() == [0, 2]
    assert part.prediction[1][0].equal(prediction[1][0][[0, 2]])
    assert (part.num_samples, part.num_missing) == (2, 1)


def test_a_mask_and_a_value_have_to_agree() -> None:
    target = torch.tensor([[1.0, NAN], [2.0, 3.0], [4.0, 5.0]])
    rows = MaskedTarget(target, torch.tensor([True, True, False]))
    assert labeled_part(torch.zeros(3, 2), rows, NAN).target.tolist() == [1.0, 2.0, 3.0]
    assert labeled_part(torch.zeros(3, 2), rows, NAN, "sample").target.tolist() == [[2.0, 3.0]]


def test_gradients_of_what_is_unlabeled_are_zero() -> None:
    prediction = torch.randn(4, 2, requires_grad=True)
    part = labeled_part(prediction, torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, 2.0], [1.0, 1.0]]), NAN)
    mse_loss(part.prediction, part.target).backward()
    assert prediction.grad is not None
    assert (prediction.grad == 0).tolist() == [[False, True], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((torch.zeros(2), MaskedTarget(torch.zeros(2), torch.ones(2))), TypeError, "boolean tensor.*torch.float32"),
        ((torch.zeros(2), MaskedTarget(torch.zeros(2), True)), TypeError, "found bool"),
        ((torch.zeros(2), {"a": torch.zeros(2)}, NAN), TypeError, "found dict.*MaskedTarget"),
        ((torch.zeros(2), torch.zeros(2, dtype=torch.long), NAN), ValueError, "NaN among targets of torch.int64.*-100"),
        ((torch.zeros(2, 4), torch.tensor([[1.0, NAN], [1.0, 1.0]]), NAN), ValueError, r"\[2, 2\].*\[2, 4\]"),
        ((torch.zeros(3), MaskedTarget(torch.zeros(2), torch.tensor([True, False]))), ValueError, r"\[2\].*\[3\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), NAN, "element", 1), ValueError, r"class_dim=1.*one dimension more"),
        (
            (torch.zeros(2, 3, 4), MaskedTarget(torch.zeros(2, 3, 4), torch.ones(2, 3) > 0), None, "element", -1),
            ValueError,
            r"class_dim=-1.*one class for each element.*\[2, 3\]",
        ),
    ],
)
def test_what_cannot_be_selected_is_refused(arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        labeled_part(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"missing": "nan"}, TypeError, "missing='nan'.*torch.nan"),
        ({"missing": True}, TypeError, "missing=True"),
        ({"missing": NAN, "missing_per": "row"}, ValueError, "missing_per='row'.*'element' or 'sample'"),
        ({"class_dim": 1.0}, TypeError, "class_dim=1.0.*must be an int"),
        ({"class_dim": True}, TypeError, "class_dim=True.*must be an int"),
        ({"class_dim": 0}, ValueError, "class_dim=0.*the dimension of the samples"),
        ({"loss": nn.CrossEntropyLoss(ignore_index=255), "missing": -1}, ValueError, "ignores 255"),
        ({"loss": functools.partial(cross_entropy, ignore_index=255), "missing": -1}, ValueError, "ignores 255"),
    ],
)
def test_tasks_refuse_what_cannot_be_meant(arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Task(**({"loss": mse_loss} | arguments))
    Task(nn.CrossEntropyLoss(), missing=-1)
    Task(functools.partial(cross_entropy, ignore_index=255), missing=255)


# In a module


def partial(**arguments: Any) -> MultiTaskModule:
    torch.manual_seed(2)
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)}
    task = Task(mse_loss, MetricCollection({"mse": MeanSquaredError()}), missing=NAN)
    return MultiTaskModule(trunk(), heads(), {"a": task, "b": task}, **(settings | arguments))


def with_holes(number: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    inputs, targets = batch(number, seed)
    generator = torch.Generator().manual_seed(seed)
    return inputs, {
        task: target.masked_fill(torch.rand(number, 1, generator=generator) < 0.5, NAN)
        for task, target in targets.items()
    }


def test_losses_gradients_and_epoch_means_are_those_of_the_labeled_samples() -> None:
    given, steps = [with_holes(8, 1), with_holes(4, 7)], Steps()
    module = partial()
    expected = partial()
    trainer = fit(module, loader(*given), loader(*given), callbacks=[steps], gradient_clip_val=None)
    inputs, targets = given[0]
    losses = {}
    for task, target in targets.items():
        rows = ~target.isnan().flatten()
        losses[task] = mse_loss(expected.heads[task](expected.trunk(inputs[rows])), target[rows])
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(steps.gradients[0][name], parameter.grad)
    for task in "ab":
        pairs = [(module(x)[task], y[task]) for x, y in given]
        errors = torch.cat([(p - y).square() for p, y in pairs])
        mean = errors[~errors.isnan()].mean()
        torch.testing.assert_close(trainer.callback_metrics[f"val/loss/{task}"], mean)
        torch.testing.assert_close(trainer.callback_metrics[f"val/mse/{task}"], mean)


def test_a_task_without_a_label_in_the_batch_is_absent_and_its_loss_not_called() -> None:
    def never_empty(prediction: Tensor, target: Tensor) -> Tensor:
        assert target.numel()
        return mse_loss(prediction, target)

    inputs, targets = batch()
    tasks = {"a": Task(never_empty), "b": Task(never_empty, missing=NAN)}
    module, steps = MultiTaskModule(trunk(), heads(), tasks), Steps()
    nothing = {"a": targets["a"], "b": targets["b"] * NAN}
    assert list(module.present_outputs((inputs, nothing))) == ["a"]
    masked = MaskedTarget(targets["b"], torch.zeros(4, dtype=torch.bool))
    fit(module, loader((inputs, nothing), (inputs, {"a": masked})), callbacks=[steps])
    assert [signals.tasks for signals in steps.signals] == [("a",)]
    assert all(gradient is None for name, gradient in steps.gradients[0].items() if name.startswith("heads.b"))


def test_masks_pass_a_datasets_default_collation_in_both_forms_of_batches() -> None:
    inputs, targets = batch(6)
    items = [
        (x, {"a": MaskedTarget(a, index % 2 == 0), "b": b})
        for index, (x, a, b) in enumerate(zip(inputs, targets["a"], targets["b"], strict=True))
    ]
    module = MultiTaskModule(trunk(), heads(), {task: Task(mse_loss) for task in "ab"})
    (joint,) = DataLoader(items, batch_size=6)  # type: ignore[arg-type]
    own = {"a": (joint[0], joint[1]["a"]), "b": (joint[0], targets["b"])}
    expected = mse_loss(module(inputs)["a"][::2], targets["a"][::2])
    for given in (joint, own):
        outputs = module.present_outputs(given)
        torch.testing.assert_close(outputs["a"].loss, expected)
        assert (outputs["a"].num_samples, outputs["b"].num_samples) == (3, None)


def test_an_override_of_task_losses_selects_too() -> None:
    class Own(MultiTaskModule):
        def task_losses(self, batch: Any) -> dict[str, TaskOutput]:
            predictions = self(batch["x"])
            return {task: self.task_output(task, predictions[task], batch[task]) for task in self.tasks}

    torch.manual_seed(2)
    module = Own(trunk(), heads(), {task: Task(mse_loss, missing=NAN) for task in "ab"})
    inputs, targets = with_holes(8, 1)
    outputs = module.present_outputs({"x": inputs, **targets})
    reference = partial().present_outputs((inputs, targets))
    for task in "ab":
        torch.testing.assert_close(outputs[task].loss, reference[task].loss)
        assert outputs[task].num_samples == int((~targets[task].isnan()).sum())


def test_classification_metrics_see_labeled_samples_alone() -> None:
    task = Task(cross_entropy, MulticlassAccuracy(3, average="micro"), missing=-100)
    module = MultiTaskModule(nn.Identity(), {"a": nn.Identity()}, {"a": task})
    logits, classes = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, -100, 1, 0])
    rows = [(logits[row : row + 1], {"a": classes[row : row + 1]}) for row in range(4)]
    trainer = quiet_trainer()
    trainer.validate(module, loader(*rows), verbose=False)
    torch.testing.assert_close(trainer.callback_metrics["val/MulticlassAccuracy/a"], torch.tensor(2 / 3))


@pytest.mark.parametrize(("precision", "way"), [("16-true", "losses"), ("bf16-true", "losses"), ("bf16-true", "trunk")])
def test_more_pixels_than_half_precision_can_count(precision: Any, way: str) -> None:
    side, steps = 300, Steps()  # 90,000 pixels; float16 ends at 65,504
    model = MultiTaskModule(
        nn.Conv2d(1, 1, 1), {"a": nn.Identity(), "b": nn.Identity()}, {k: Task(mse_loss, missing=NAN) for k in "ab"},
        accumulate_grad_batches=2,
    )  # fmt: skip
    images = torch.rand(1, 1, side, side)
    given = (images, {"a": images, "b": images.masked_fill(images < 0.5, NAN)})
    weighting = [fixed({"a": 1.0, "b": 1.0}, "gramian")] if way == "trunk" else []
    fit(model, loader(given, given), precision=precision, callbacks=[*weighting, steps])
    (signals,) = steps.signals
    assert torch.isfinite(signals.losses).all()
    assert all(torch.isfinite(gradient).all() for gradient in steps.gradients[0].values() if gradient is not None)


def test_labels_of_minus_100_that_a_metric_does_not_take_are_named_with_the_way_out() -> None:
    task = Task(cross_entropy, MulticlassAccuracy(3, average="macro", validate_args=False))
    module = MultiTaskModule(nn.Linear(3, 4), {"kind": nn.Linear(4, 3)}, {"kind": task})
    with pytest.raises(Exception, match=r"bincount|Detected") as raised:
        fit(module, loader((torch.randn(4, 3), {"kind": torch.tensor([0, -100, 2, 1])})))
    assert re.search(
        r"'kind'.*some targets are -100.*Task\(missing=-100\)", " ".join(getattr(raised.value, "__notes__", ()))
    )
