"""What holds for the tests of gradients."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def compiled_for_several_passes() -> Iterator[None]:
    """Compiled parts allow several backward passes, so that all tests share them: compiling takes most of the time."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield
