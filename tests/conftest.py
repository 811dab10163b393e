"""What holds for every test: one thread, fixed seeds, a quiet Trainer."""

import logging

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)
