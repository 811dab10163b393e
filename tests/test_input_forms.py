"""Inputs of any form: one argument of the trunk, or several by position."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtl import MultiTaskModule
from tests.small import batches, small
from tests.training import fit, loader, quiet_trainer

SOME = batches(4, 4, 2, 3, 4)

# Inputs of any form


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Reads(nn.Module):
    """A trunk that takes one argument, whatever it is."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.read, self.layer = read, nn.Linear(3, 4)

    def forward(self, inputs: Any) -> Tensor:
        features: Tensor = self.layer(self.read(inputs))
        return features


def packed(*lengths: int) -> Any:
    return pack_sequence([torch.randn(length, 3) for length in lengths], enforce_sorted=False)


FORMS: dict[str, tuple[Any, Any]] = {
    "packed": (lambda: packed(2, 3), lambda x: torch.stack([one.mean(0) for one in unpack_sequence(x)])),
    "named tuple": (lambda: Pair(torch.randn(2, 3), torch.randn(2, 3)), lambda pair: pair.left + pair.right),
    "images": (
        lambda: [torch.randn(3, 4, 5), torch.randn(3, 2, 2)],
        lambda images: torch.stack([image.mean((1, 2)) for image in images]),
    ),
    "one image": (lambda: [torch.randn(3, 4, 5)], lambda images: torch.stack([image.mean((1, 2)) for image in images])),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_this_form_are_one_argument(form: str) -> None:
    make, read = FORMS[form]
    inputs = make()
    number = 1 if form == "one image" else 2
    module = small()
    module.trunk = Reads(read)
    rows = (inputs, {"a": torch.randn(number, 1), "b": torch.randn(number, 1)})
    trainer = fit(module, loader(rows))
    assert trainer.global_step == 1
    assert trainer.predict(module, loader(rows)) is not None


def test_a_list_is_positions_of_a_trunk_that_takes_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            features: Tensor = self.layer(left + right)
            return features

    module = small()
    module.trunk = Two()
    assert module([torch.randn(2, 3), torch.randn(2, 3)])["a"].shape == (2, 1)


def test_prediction_from_a_loader_of_inputs() -> None:
    module, inputs = small(), torch.randn(5, 3)
    predicted = quiet_trainer().predict(module, DataLoader(TensorDataset(inputs), batch_size=5))
    assert predicted is not None
    torch.testing.assert_close(predicted[0]["a"], module(inputs)["a"])  # type: ignore[call-overload]


def test_prediction_from_batches_of_another_form_says_what_to_override() -> None:
    class Own(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            predictions = self(batch["x"])
            return {task: mse_loss(predictions[task], batch["y"]) for task in self.tasks}

    one = {"x": torch.randn(2, 3), "y": torch.randn(2, 1)}
    module = small(cls=Own)
    fit(module, loader(one))
    with pytest.raises(TypeError, match=r"keys \['x', 'y'\].*override predict_step\(batch, batch_idx\)"):
        quiet_trainer().predict(module, loader(one))
