"""The process with the second device, one for a test run."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.devices.build import build, is_built
from tests.devices.machine import begin

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def process() -> Iterator[ProcessPoolExecutor]:
    # Spawned: a process with a device of its own must not be one that other tests fork from.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin) as executor:
        yield executor


def _runner(process: ProcessPoolExecutor) -> Run:
    return lambda function, *arguments: process.submit(function, *arguments).result(timeout=300)


@pytest.fixture(scope="session")
def machine(process: ProcessPoolExecutor) -> Run:
    """Calls a function, by its name, in the process that has the device; builds that where a compiler is at hand."""
    try:
        build()
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"no second device, {error}")
    return _runner(process)


@pytest.fixture
def machine_if_built(request: pytest.FixtureRequest) -> Run:
    """The same, and nothing is compiled."""
    if not is_built():
        pytest.skip("the second device is not built yet; the slow tests build it, once")
    run: Run = request.getfixturevalue("machine")
    return run
