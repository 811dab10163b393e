"""A module that is compiled whole evaluates as it is; its tasks are one operation then, which cannot be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn

from lightning_mtl import BalancedModule
from tests.small import batches, binary, small
from tests.test_users_bring import Compilations, of_torch_dynamo
from tests.training import fit, loader, quiet_trainer


class Whole(BalancedModule):
    def __init__(self) -> None:
        super().__init__(["a", "b"])
        self.net = nn.Linear(3, 2)

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        return {"a": self.net(batch[0])[:, 0].mean(), "b": self.net(batch[0])[:, 1].mean()}


@pytest.mark.parametrize(("make", "part"), [(small, r"module\.trunk"), (Whole, r"self\.net")])
def test_training_is_refused(make: Callable[[], Any], part: str) -> None:
    compiled: Any = torch.compile(make(), backend="eager")
    with pytest.raises(ValueError, match=rf"torch.compile\(.*Compile the parts: .*{part}.compile\(\)"):
        fit(compiled, loader(*batches(4)))


@of_torch_dynamo
@pytest.mark.parametrize("make", [binary, Whole])
def test_evaluation(make: Callable[[], Any]) -> None:
    torch.compiler.reset()
    module, given = make(), loader(*batches(4, 3))
    for stage in ("validate", "test"):
        [expected] = getattr(quiet_trainer(), stage)(module, given, verbose=False)
        compiled: Any = torch.compile(module, backend=Compilations())
        [found] = getattr(quiet_trainer(), stage)(compiled, given, verbose=False)
        module = to_uncompiled(compiled)
        assert found == pytest.approx(expected)
        assert found


@of_torch_dynamo
def test_prediction() -> None:
    torch.compiler.reset()
    module, given, backend = small(), loader(*[batch[0] for batch in batches(4, 3)]), Compilations()
    expected = quiet_trainer().predict(module, given)
    compiled: Any = torch.compile(module, backend=backend)
    torch.testing.assert_close(quiet_trainer().predict(compiled, given), expected)
    assert backend.number
