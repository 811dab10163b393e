"""A ``training_step`` of the user's own: around the module's, in its place, or with a loss of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from lightning_mtl.weighting import DWA, GradNorm
from tests.small import batches, small
from tests.test_border import in_mode
from tests.training import fit, flat_parameters, loader

SOME = batches(4, 4, 2, 3, 4)


class Ported(MultiTaskModule):
    """A LightningModule's step, its base class changed."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([mse_loss(self(batch[0])[task], target) for task, target in batch[1].items()]).sum()


class Around(MultiTaskModule):
    """Adds to the module's own step, and leaves a batch out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx else None


class Through(MultiTaskModule):
    """Comes to the module's own step by another method."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.step(batch, batch_idx)

    def step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx)


class Naming(MultiTaskModule):
    """Names the module's own step, and never calls it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if self.trainer.global_step > 100 else None


@pytest.mark.parametrize(("cls", "automatic"), [(Ported, False), (Ported, True), (Naming, False)])
def test_a_replaced_training_step_is_refused(cls: type[MultiTaskModule], automatic: bool) -> None:
    message = rf"{cls.__name__}.training_step replaces the module's own.*task_losses.*super\(\).training_step"
    with pytest.raises(ValueError, match=message):
        fit(in_mode(small(cls=cls), automatic=automatic), loader(*SOME), callbacks=[DWA()])


@pytest.mark.parametrize("cls", [Around, Through])
def test_a_training_step_around_the_modules_own_is_fine(cls: type[MultiTaskModule]) -> None:
    trainer = fit(small(cls=cls), loader(*SOME), max_epochs=2)
    assert trainer.global_step == (8 if cls is Around else 10)


class Changing(MultiTaskModule):
    """Changes the loss that the module's own step returned."""

    change: Any

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return type(self).change(loss, self.trunk.get_parameter("0.weight").square().sum())


def added_in_place(loss: Tensor, term: Tensor) -> Tensor:
    loss += term
    return loss


CHANGES: dict[str, Any] = {
    "a term": lambda loss, term: loss + term,
    "a term in place": added_in_place,
    "a factor": lambda loss, _: 3 * loss,
    "a term in a dict": lambda loss, term: {"loss": loss + term, "term": term.detach()},
}
SAME: dict[str, Any] = {
    "itself in a dict": lambda loss, term: {"loss": loss, "term": term.detach()},
    "a copy": lambda loss, _: loss.clone(),
    "in half precision": lambda loss, _: loss.half(),
    "nothing": lambda _, __: None,
    "other figures": lambda _, term: {"term": term.detach()},
}


def changing(change: Any) -> MultiTaskModule:
    return small(cls=type("Changing", (Changing,), {"change": staticmethod(change)}))


@pytest.mark.parametrize("callbacks", [[], [GradNorm(at="trunk")]], ids=["plain", "measured"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_loss_that_is_changed_after_its_step_is_refused(change: str, callbacks: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"Changing.training_step returns another loss.* terms into task_losses"):
        fit(changing(CHANGES[change]), loader(*SOME), callbacks=callbacks)
    assert fit(in_mode(changing(CHANGES[change]), automatic=True), loader(*SOME)).global_step == 5


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("same", SAME)
def test_a_loss_that_is_handed_on_is_fine(same: str) -> None:
    module, plain = changing(SAME[same]), small()
    fit(module, loader(*SOME))
    fit(plain, loader(*SOME))
    assert torch.equal(flat_parameters(module), flat_parameters(plain))
