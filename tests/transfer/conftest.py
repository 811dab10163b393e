"""A Trainer factory whose fits are counted from zero in each test."""

from __future__ import annotations

import functools
from collections.abc import Callable

import lightning.pytorch as pl
import pytest

from tests.transfer.fits import Counted, counted_trainer


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], pl.Trainer]:
    monkeypatch.setattr(Counted, "fits", 0)
    return functools.partial(counted_trainer, 3)
