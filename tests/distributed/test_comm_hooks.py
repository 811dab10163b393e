"""DDP's communication hooks see every gradient once an optimizer step, in the one final backward pass."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.hooks_worker import WAYS, train
from tests.distributed.pairs import Pair
from tests.thinning import thinned


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize("name", thinned(WAYS))
def test_every_gradient_is_communicated_once_a_step(name: str, compresses: bool, pair: Pair) -> None:
    alone = train(name, compresses)
    first, second = pair.run(train, name, compresses)
    assert first["steps"] == second["steps"] == 4 // WAYS[name][1]
    assert first["numbers"] == first["steps"] * len(first["parameters"])
    assert first["parameters"].equal(second["parameters"])
    tolerance = 1e-3 if compresses else 1e-6
    torch.testing.assert_close(first["parameters"], alone["parameters"], rtol=0, atol=tolerance)
