"""What holds for the tests of gradients."""

from collections.abc import Iterator

import pytest
import torch

from lightning_mtl.gradients import batched, trunk_gramian


@pytest.fixture(autouse=True)
def compiled_for_several_passes() -> Iterator[None]:
    """Compiled parts allow several backward passes, so that all tests share them: compiling takes most of the time."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers get their short form, and tasks one pass, at any size: for the tests' small ones rows would do."""
    monkeypatch.setattr(trunk_gramian, "is_worth_it", lambda *_, **__: True)
    monkeypatch.setattr(batched, "_fits", lambda *_: True)
