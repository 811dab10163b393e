"""What users get wrong with losses, metrics, heads, arguments and checkpoints names the task and the way out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import BalancedModule, MultiTaskModule, Task
from lightning_mtl.weighting import GradNorm
from tests.training import fit, loader

X, AGE = torch.zeros(6, 4), torch.zeros(6, 1)
SMILE = torch.tensor([0, 1, 2, 0, 1, 2])


def made(**parts: Any) -> MultiTaskModule:
    heads = {"age": nn.Linear(8, 1), "smile": nn.Linear(8, 3)} | parts.pop("heads", {})
    tasks = {"age": Task(l1_loss), "smile": Task(cross_entropy)} | parts.pop("tasks", {})
    return MultiTaskModule(parts.pop("trunk", nn.Sequential(nn.Linear(4, 8))), heads, tasks, **parts)


def told(module: MultiTaskModule, inputs: Any = X, **targets: Any) -> str:
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as raised:
        fit(module, loader((inputs, {"age": AGE, "smile": SMILE} | targets)))
    notes = getattr(raised.value, "__notes__", [])  # on Python 3.10 the note is in the message
    return " ".join([str(raised.value), *notes])


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        (
            made,
            {"smile": SMILE.float()},
            "task 'smile': .* targets float32 .*class labels .* int64: target.long",
        ),
        (made, {"smile": SMILE.int()}, "task 'smile': .* targets int32 .*target.long"),
        (made, {"smile": SMILE + 1}, "task 'smile': .*labels reach 3, and the head gives classes 0 to 2"),
        (
            lambda: made(tasks={"age": Task(binary_cross_entropy_with_logits)}),
            {"age": torch.ones(6, 1, dtype=torch.long)},
            r"task 'age': .*needs real numbers as targets: target.float\(\)",
        ),
        (
            lambda: made(tasks={"smile": Task(cross_entropy, MulticlassAccuracy(5))}),
            {},
            "metrics of task 'smile': .*MulticlassAccuracy has num_classes=5, and the head gives 3",
        ),
        (
            lambda: made(heads={"smile": nn.Linear(9, 3)}),
            {},
            r"head of task 'smile': the trunk gives float32 \[6, 8\], and the head's first layer takes 9 features",
        ),
        (made, {"inputs": {"x": X}}, r"dict with the keys \['x'\].*Sequential.forward\(input\).*inputs='x'"),
    ],
)
def test_a_step_that_fails_says_why(module: Callable[[], MultiTaskModule], given: Any, expected: str) -> None:
    found = told(module(), **given)
    assert re.search(expected, found), found


def test_two_inputs_for_a_trunk_that_takes_one() -> None:
    with pytest.raises(TypeError, match=r"inputs are 2 objects, .*Sequential.forward\(input\)"):
        made()((X, X))


def test_what_a_trunk_raises_itself_stays() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("mine")

    assert told(made(trunk=Broken())) == "mine"


ADAM = torch.optim.Adam([nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Task(cast("Any", nn.L1Loss)), r"Task\(loss=...\) was given the class L1Loss, .*make one: L1Loss\(\)"),
        (
            lambda: Task(l1_loss, cast("Any", MulticlassAccuracy)),
            r"class MulticlassAccuracy, .*make one: MulticlassAccuracy\(\)",
        ),
        (
            lambda: made(optimizer=ADAM),
            r"optimizer must be a function .*Adam, lr=1e-3\); found Adam",
        ),
        (lambda: made(optimizer=None), "found None; leave the argument out for Adam"),
        (lambda: made(lr_scheduler="cosine"), "lr_scheduler must be a function .* found str"),
        (
            lambda: made(weighting=GradNorm(alpha=0.5)),
            r"given GradNorm\(alpha=0.5\), which is a callback .*Trainer\(callbacks=\[GradNorm\(alpha=0.5\)\]\)",
        ),
        (lambda: made(callbacks=[GradNorm()]), r"given GradNorm\(\), which is a callback"),
        (lambda: made(widht=3), "unexpected keyword argument 'widht'"),
    ],
)
def test_arguments_of_another_kind_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        make()


def test_a_subclass_may_take_a_callback_for_itself() -> None:
    class Own(BalancedModule):
        def __init__(self, method: GradNorm) -> None:
            super().__init__(["a"], optimizer=functools.partial(torch.optim.SGD, lr=0.1))
            self.method = method

        def task_losses(self, batch: Any) -> Any:
            raise AssertionError

    assert repr(Own(GradNorm()).method) == "GradNorm()"


class Faces(MultiTaskModule):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(4, width), {"age": nn.Linear(width, 1)}, {"age": Task(l1_loss)})


def test_a_checkpoint_says_what_it_lacks(tmp_path: Path) -> None:
    for module, needed in ((made(), "trunk, heads, tasks"), (Faces(3), "width")):
        fit(module, loader((X, {"age": AGE}))).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(TypeError, match=f"needs {needed}, which the checkpoint does not hold"):
            type(module).load_from_checkpoint(tmp_path / "last.ckpt")
    loaded = Faces.load_from_checkpoint(tmp_path / "last.ckpt", width=3)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())
