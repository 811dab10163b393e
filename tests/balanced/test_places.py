"""What tasks share may be said; tools that need a trunk say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import BalancedModule, Task
from lightning_mtl.architectures import parameter_report
from lightning_mtl.finetuning import drop_task, export
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.monitors import GradientConflict
from lightning_mtl.transfer import train_and_score
from lightning_mtl.weighting import MGDA
from tests.balanced import oracle
from tests.balanced.test_fits import Turns, inputs, turns
from tests.balanced.test_steps import Watch
from tests.training import fit, loader, quiet_trainer


def test_shared_parameters_may_be_said() -> None:
    class Said(Turns):
        def shared_parameters(self) -> list[nn.Parameter]:
            return list(self.body[0].parameters())

    torch.manual_seed(4)
    module, steps = Said().double(), Watch()
    found = oracle.gradients(module, inputs("abc"))
    fit(module, loader(inputs("abc")), callbacks=[MGDA(), steps], precision=64)
    assert steps.signals[0].gramian is not None
    torch.testing.assert_close(steps.signals[0].gramian, oracle.gramian(found, {"body.0.weight", "body.0.bias"}))


def test_monitors_look_on() -> None:
    module = turns()
    fit(module, loader(inputs("a"), inputs("abc")), callbacks=[monitor := GradientConflict()], precision=64)
    assert not monitor.off


@pytest.mark.parametrize("at", ["features", "last_layer"])
def test_places_of_a_trunk_are_refused(at: str) -> None:
    with pytest.raises(ValueError, match=r"Turns has no trunk\. Use MGDA\(at='trunk'\)"):
        fit(turns(), loader(inputs("abc")), callbacks=[MGDA(at=at)])
    with pytest.raises(ValueError, match=r"Turns has no trunk\. Use GradientConflict\(at='trunk'\)"):
        fit(turns(), loader(inputs("abc")), callbacks=[GradientConflict(at=at)])


def test_tools_that_work_on_a_trunk_say_so(tmp_path: Path) -> None:
    module: Any = turns()
    with pytest.raises(TypeError, match=r"export works on a trunk and heads, which Turns has not"):
        export(module, inputs("abc"), tmp_path / "model.pt2")
    with pytest.raises(TypeError, match=r"drop_task works on a trunk and heads"):
        drop_task(module, "a")
    with pytest.raises(ValueError, match="parameter_report asks a trunk and heads"):
        parameter_report(module, inputs("abc"))
    with pytest.raises(ValueError, match=r"parameter_groups\(\) makes a group of the trunk and of each head"):
        module.parameter_groups()
    with pytest.raises(ValueError, match="give the optimizer groups of its own"):
        fit(module, loader(inputs("abc")), callbacks=[TaskLearningRate(Importance({"a": 2.0}))], precision=64)


def test_rates_of_tasks_whose_groups_are_named() -> None:
    class Grouped(Turns):
        def configure_optimizers(self) -> Any:
            groups: list[dict[str, Any]] = [
                {"params": top.parameters(), "name": f"head/{task}"} for task, top in self.tops.items()
            ]
            rest = [*self.body.parameters(), *self.detour.parameters()]
            return torch.optim.SGD([*groups, {"params": rest}], lr=0.1)

    torch.manual_seed(4)
    module = Grouped().double()
    before = module.tops["a"].weight.detach().clone()
    expected = oracle.gradients(module, inputs("abc"))["a"]["tops.a.weight"]
    fit(module, loader(inputs("abc")), callbacks=[TaskLearningRate(Importance({"a": 2.0}))], precision=64)
    torch.testing.assert_close(before - module.tops["a"].weight.detach(), 0.2 * expected)


def test_single_task_baselines() -> None:
    scores = train_and_score(
        turns().float(),
        (loader({task: x.float() for task, x in inputs("abc").items()}),) * 2,
        lambda: quiet_trainer(callbacks=[MGDA()]),
        tasks=["b"],
    )
    assert list(scores) == ["b"]


def test_what_cannot_work_is_refused() -> None:
    class Apart(BalancedModule):
        def __init__(self) -> None:
            super().__init__(["a", "b"])
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def task_losses(self, batch: Tensor) -> Mapping[str, Tensor]:
            return {"a": self.a(batch).mean(), "b": self.b(batch).mean()}

    with pytest.raises(ValueError, match="no parameter that trains is reached by the losses of two of the tasks"):
        fit(Apart(), loader(torch.rand(2, 3)), callbacks=[MGDA()])
    with pytest.raises(TypeError, match="has no task_losses"):
        BalancedModule(["a", "b"])
    with pytest.raises(TypeError, match=r"Apart2\(tasks=\.\.\.\) must be a list of one name or more"):
        type("Apart2", (Apart,), {"__init__": lambda self: BalancedModule.__init__(self, "ab")})()
    with pytest.raises(ValueError, match="has no heads"):
        type(
            "Apart3",
            (Apart,),
            {"__init__": lambda self: BalancedModule.__init__(self, {"a": Task(max, standardize=True)})},
        )()

    class Gan(Apart):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.a, self.b)]

    with pytest.raises(ValueError, match="returned 2 optimizers, a BalancedModule takes one"):
        fit(Gan(), loader(torch.rand(2, 3)))
