"""What holds for every test: one thread, fixed seeds, a quiet Trainer; and the two processes that train together."""

import gc
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.distributed.pairs import Pair


def pytest_configure() -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Put files, not tests, on xdist's workers, unless ``--dist`` says otherwise."""
    from tests.scheduling import ByFile

    return ByFile(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_finish() -> None:
    """Garbage collection need not look at modules and collected tests, a million objects, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that train together."""
    started = Pair(tmp_path_factory.mktemp("pair"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)
