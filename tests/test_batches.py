"""What a batch may look like, and what task_losses may return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from tests.small import TASKS, batch, batches, heads, regressions, small, trunk
from tests.training import Steps, fit, flat_parameters, loader


def losses_of(module: MultiTaskModule, given: Any) -> dict[str, float]:
    return {task: output.loss.item() for task, output in module.present_outputs(given).items()}


def test_a_joint_batch() -> None:
    module, (inputs, targets) = small(), batch()
    z = module.trunk(inputs)
    expected = {task: mse_loss(module.heads[task](z), targets[task]).item() for task in TASKS}
    assert losses_of(module, (inputs, targets)) == pytest.approx(expected)
    assert losses_of(module, [inputs, targets]) == pytest.approx(expected)
    assert losses_of(module, (inputs, {"b": targets["b"], "a": targets["a"]})) == pytest.approx(expected)


def test_a_batch_of_one_pair_a_task() -> None:
    module, first, second = small(), batch(4, seed=1), batch(2, seed=2)
    expected = {
        task: mse_loss(module.heads[task](module.trunk(inputs)), targets[task]).item()
        for task, (inputs, targets) in zip(TASKS, (first, second), strict=True)
    }
    given = {"a": (first[0], first[1]["a"]), "b": [second[0], second[1]["b"]]}
    assert losses_of(module, given) == pytest.approx(expected)
    assert losses_of(module, {**given, "b": None}) == pytest.approx({"a": expected["a"]})
    assert losses_of(module, {"a": given["a"]}) == pytest.approx({"a": expected["a"]})


def test_absent_targets() -> None:
    module, (inputs, targets) = small(), batch()
    assert set(losses_of(module, (inputs, {"a": targets["a"]}))) == {"a"}
    assert set(losses_of(module, (inputs, {"a": None, "b": targets["b"]}))) == {"b"}
    assert losses_of(module, (inputs, {})) == {}


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + shift
        return result


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_inputs_become_the_trunks_arguments(form: str) -> None:
    x, shift = torch.ones(2, 3), torch.tensor(2.0)
    module = MultiTaskModule(Adding(), heads(), regressions())
    inputs = {"tuple": (x, shift), "list": [x, shift], "dict": {"x": x, "shift": shift}}[form]
    z = module.trunk(x, shift)
    for task, prediction in module(inputs).items():
        torch.testing.assert_close(prediction, module.heads[task](z))


def test_a_trunk_with_one_entry_a_task() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"b": x + 1, "a": x, "more": x - 1}

    module = MultiTaskModule(Branches(), {task: nn.Linear(3, 1) for task in TASKS}, regressions())
    x = torch.randn(2, 3)
    predictions = module(x)
    torch.testing.assert_close(predictions["a"], module.heads["a"](x))
    torch.testing.assert_close(predictions["b"], module.heads["b"](x + 1))


class Returning(MultiTaskModule):
    """Returns what the batch holds as what task_losses says."""

    given: Any = None

    def task_losses(self, batch: Any) -> Any:
        return self.given(self, batch)


def returning(given: Any) -> MultiTaskModule:
    module = small(cls=Returning)
    assert isinstance(module, Returning)
    module.given = given
    return module


def test_an_override_takes_anything_and_returns_tensors_or_outputs() -> None:
    def given(module: MultiTaskModule, text: str) -> dict[str, Tensor | TaskOutput | None]:
        z = module.trunk(torch.full((2, 3), float(len(text))))
        loss = module.heads["a"](z).mean()
        return {"b": TaskOutput(module.heads["b"](z).square().mean(), num_samples=2), "a": loss}

    module = returning(given)
    before = flat_parameters(module)
    steps = Steps()
    fit(module, loader("some", "text"), callbacks=[steps])
    assert steps.signals[0].tasks == ("a", "b")  # in the module's order
    assert not torch.equal(before, flat_parameters(module))


def test_none_drops_a_task() -> None:
    module = returning(lambda module, _batch: {"a": module.heads["a"](torch.ones(1, 4)).mean(), "b": None})
    assert set(losses_of(module, "anything")) == {"a"}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_of_one_number_is_a_scalar(shape: tuple[int, ...]) -> None:
    module = returning(lambda module, _batch: {"a": module.trunk(torch.ones(1, 3)).mean().reshape(shape)})
    assert module.present_outputs(None)["a"].loss.shape == ()


def test_losses_of_two_dtypes() -> None:
    def given(module: MultiTaskModule, _batch: Any) -> dict[str, Tensor]:
        z = module.trunk(torch.ones(2, 3))
        return {"a": module.heads["a"](z).mean(), "b": module.heads["b"](z).double().mean()}

    steps, module = Steps(), returning(given)
    fit(module, loader(0), callbacks=[steps])
    assert steps.signals[0].losses.dtype == torch.float64
    assert all(gradient is not None for gradient in steps.gradients[0].values())


def test_a_loss_module_moves_and_is_saved_with_the_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return self.get_buffer("scale") * l1_loss(prediction, target)

    module = MultiTaskModule(trunk(), heads(), {"a": Task(Scaled()), "b": Task(mse_loss)})
    assert [name for name in module.state_dict() if name.endswith("scale")] == ["loss_modules.a.scale"]
    module.double()
    inputs, targets = batch()
    loss = module.present_outputs((inputs.double(), {"a": targets["a"].double()}))["a"].loss
    assert loss.dtype == torch.float64


def test_predict_takes_inputs_with_or_without_targets() -> None:
    module, (inputs, targets) = small(), batch()
    expected = module(inputs)
    per_task = {task: (inputs, targets[task]) for task in TASKS}
    for given in (inputs, (inputs, targets), [inputs, targets], (inputs,), per_task):
        found = module.predict_step(given, 0)
        assert list(found) == list(TASKS)
        for task in TASKS:
            torch.testing.assert_close(found[task], expected[task])
    assert list(module.predict_step({"a": per_task["a"], "b": None}, 0)) == ["a"]


def test_an_overridden_forward_is_used_for_both_forms() -> None:
    class Negative(MultiTaskModule):
        def forward(self, inputs: Any) -> dict[str, Tensor]:
            return {task: -prediction for task, prediction in super().forward(inputs).items()}

    module, plain, (inputs, targets) = small(cls=Negative), small(), batch()
    expected = {task: mse_loss(-plain(inputs)[task], targets[task]).item() for task in TASKS}
    assert losses_of(module, (inputs, targets)) == pytest.approx(expected)
    assert losses_of(module, {task: (inputs, targets[task]) for task in TASKS}) == pytest.approx(expected)
    torch.testing.assert_close(module.predict_step({"a": (inputs, targets["a"])}, 0)["a"], -plain(inputs)["a"])


@pytest.mark.parametrize("mode", ["max_size", "min_size", "max_size_cycle"])
def test_a_loader_a_task(mode: Any) -> None:
    long = [(x, y["a"]) for x, y in batches(4, 4, 4)]
    short = [(x, y["b"]) for x, y in batches(2, seed=9)]
    loaders = CombinedLoader({"a": loader(*long), "b": loader(*short)}, mode)
    steps = Steps()
    trainer = fit(small(), loaders, callbacks=[steps])
    present = [signals.tasks for signals in steps.signals]
    both, alone = ("a", "b"), ("a",)
    assert present == {"max_size": [both, alone, alone], "min_size": [both], "max_size_cycle": [both] * 3}[mode]
    assert {"loss_epoch/a", "loss_epoch/b"} <= trainer.callback_metrics.keys()
